package explain

import (
	"fmt"
	"strings"

	"trireme.dev/shared/sched/autoscale"
)

// names are what operators call instances with these roles.
var names = map[string]string{"E": "encoder", "P": "prefill", "D": "decoder"}

func named(roles string) string {
	if n := names[roles]; n != "" {
		return n
	}
	return roles
}

// Command is what a person types to make a change of the fleet that a view shows.
func Command(c autoscale.Change, v *autoscale.View) string {
	replicas := func(more int) string {
		n := more
		for k := range v.Instances {
			if i := &v.Instances[k]; i.Node == c.Node && i.Roles == c.Roles && !i.Standby() {
				n++
			}
		}
		return fmt.Sprintf("trireme scale %s --replicas %d --node %s", named(c.Roles), n, c.Node)
	}
	switch c.Action {
	case autoscale.Widen, autoscale.Narrow, autoscale.Promote:
		return fmt.Sprintf("trireme scale %s %d", c.Instance, c.NPUs)
	case autoscale.Move:
		if c.Instance == "" {
			return fmt.Sprintf("trireme scale %s %d && %s", c.From, c.FromNPUs, replicas(1))
		}
		var all []string
		for _, n := range c.Numbers {
			all = append(all, fmt.Sprintf("trireme role %s/%d %s --instance %s", c.Node, n, named(c.Roles), c.Instance))
		}
		return strings.Join(all, " && ")
	case autoscale.Add:
		return replicas(c.Count)
	case autoscale.Remove: // the one that was started last goes, which is as good
		return replicas(-1)
	case autoscale.Rebalance:
		return "trireme rebalance " + c.Instance
	}
	return ""
}
