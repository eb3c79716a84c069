package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/shared/wire"
)

// ErrNoStarter is returned by SetReplicas.
var ErrNoStarter = errors.New("nobody starts instances there")

const (
	replicasPatience = 10 * time.Second      // for an answer of whoever starts processes, who asks the HMM of the node
	replicasLook     = 20 * time.Millisecond // between two looks whether instances have come or gone
)

// RoleLetters are the letters of what an operator calls an instance: D of decoder; EPD is as it is.
func RoleLetters(word string) string {
	return cmp.Or(map[string]string{"encoder": "E", "prefill": "P", "decoder": "D"}[word], word)
}

// ServiceOf is the command that runs instances with roles of certain letters.
func ServiceOf(letters string) string {
	return cmp.Or(map[string]string{"E": "encoder", "P": "prefill", "D": "decoder"}[letters], "stage")
}

// SetReplicas asks whoever starts the processes of a node for so many instances, and returns when those that were started are ready and those that were
// stopped have gone, or ctx has ended: what was begun goes on then. told, if not nil, is told of each. ErrRefused says that nothing was done, and why;
// ErrNoStarter that nobody starts processes there.
func (b *Bus) SetReplicas(ctx context.Context, node string, ask wire.Replicas, told func(string)) (report wire.ReplicasReport, err error) {
	asking, cancel := context.WithTimeout(ctx, replicasPatience)
	err = b.Ask(asking, wire.SubjectReplicas(node), &ask, &report)
	cancel()
	switch {
	case errors.Is(err, nats.ErrNoResponders):
		return report, fmt.Errorf("node %s: %w: `trireme up` would; with docker compose it is `docker compose up -d --scale "+
			"%s=%d`, on Kubernetes kubectl scale", node, ErrNoStarter, ServiceOf(ask.Roles), ask.Count)
	case err != nil:
		return report, fmt.Errorf("asking for %d instances on node %s: %w", ask.Count, node, err)
	case report.Why != "":
		return report, fmt.Errorf("%d instances of %s on node %s %w: %s", ask.Count, ServiceOf(ask.Roles), node, ErrRefused, report.Why)
	case ask.Check:
		return report, nil
	}
	if told == nil {
		told = func(string) {}
	}
	looking, cancel := context.WithCancel(ctx) // which ends the view
	defer cancel()
	view, err := b.Instances(looking)
	if err != nil {
		return report, err
	}
	coming, leaving := slices.Clone(report.Started), slices.Clone(report.Stopped)
	for len(coming)+len(leaving) > 0 {
		ready, there := map[string]bool{}, map[string]bool{}
		for _, i := range view.All() {
			if i.Node == node {
				there[i.Name] = true
				ready[i.Name] = ready[i.Name] || i.Ready
			}
		}
		coming = slices.DeleteFunc(coming, func(n string) bool {
			if ready[n] {
				told(n + " is ready")
			}
			return ready[n]
		})
		leaving = slices.DeleteFunc(leaving, func(n string) bool {
			if !there[n] {
				told(n + " has gone")
			}
			return !there[n]
		})
		if (&pause{next: replicasLook}).sleep(ctx) != nil {
			return report, fmt.Errorf("waiting for %s: %w", strings.Join(append(coming, leaving...), ", "), context.Cause(ctx))
		}
	}
	return report, nil
}
