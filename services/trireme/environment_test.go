package main

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"trireme.dev/services/trireme/supervise"
)

// A variable that is set for services, or for other commands, changes no command in which the flag of that name is something else, and
// nothing is deleted for a variable.
func TestEnvironmentOfOthers(t *testing.T) {
	for _, x := range []struct{ variable, value, args, want string }{
		{"TRIREME_REPLICAS", "3", "scale decoder 2 --nats-url nats://127.0.0.1:1", "no NATS at"},
		{"TRIREME_REPLICAS", "3", "scale decoder", "to how many NPUs"},
		{"TRIREME_ALL", "true", "dead purge", "say which"},
	} {
		t.Run(x.args, func(t *testing.T) {
			t.Setenv(x.variable, x.value)
			if text, status := said(strings.Fields(x.args)...); status == 0 || !strings.Contains(text, x.want) {
				t.Errorf("with %s=%s: status %d, %s; want %q", x.variable, x.value, status, text, x.want)
			}
		})
	}
}

// Instances of `trireme up` have the NPUs that its topology says, whatever a variable says of others; what up has no flag for variables may say.
func TestChildrenHaveTheNPUsOfTheTopology(t *testing.T) {
	c := &upCmd{Topology: "1E1P1Dx4", HostMemory: 1 << 30}
	p, err := c.plan()
	if err != nil {
		t.Fatal(err)
	}
	made := c.children(&env{}, p, "trireme")
	if slices.Contains(made.gateway.Args, "--served-name") {
		t.Errorf("the gateway is told a name that stands above TRIREME_SERVED_NAME: %q", made.gateway.Args)
	}
	for _, g := range p.topology.Groups {
		args := strings.Join(made.stage(g, "name").Args, " ")
		if want := fmt.Sprintf("--npus %d", g.NPUs); !strings.Contains(args, want) {
			t.Errorf("%s is started with %q, want %s in it", g.Roles, args, want)
		}
	}
}

// The password of a NATS server is no argument of a child, which everybody on the machine can read.
func TestChildrenGetNATSByTheEnvironment(t *testing.T) {
	const secret = "nats://me:secret@10.0.0.5:4222"
	t.Setenv("TRIREME_NATS_URL", "nats://another:4222")
	c := &upCmd{Topology: "1EPD", HostMemory: 1 << 30, NATSURL: secret, scalerFlags: scalerFlags{Scaler: "auto"}}
	p, err := c.plan()
	if err != nil {
		t.Fatal(err)
	}
	made := c.children(&env{}, p, "trireme")
	for _, child := range []supervise.Child{made.gateway, made.hmm, *made.scaler, made.stage(p.topology.Groups[0], "name")} {
		at := slices.IndexFunc(child.Env, func(v string) bool { return v == "TRIREME_NATS_URL="+secret })
		last := slices.IndexFunc(child.Env[at+1:], func(v string) bool { return strings.HasPrefix(v, "TRIREME_NATS_URL=") })
		if args := strings.Join(child.Args, " "); at < 0 || last >= 0 || strings.Contains(args, "secret") || strings.Contains(args, "--nats-url") {
			t.Errorf("%s: %s, with TRIREME_NATS_URL at %d, and again at %d", child.Name, args, at, last)
		}
	}
}
