package act

import (
	"context"
	"fmt"
	"strings"

	"trireme.dev/services/scaler/lead"
	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

// advice tells people what to run where nobody else changes the number of processes.
type advice struct {
	beats   *bus.Instances
	targets map[string]string // Cluster.Targets
}

// services are those of compose.yaml by their role. Instances with several run in the place of the first of these (docs/compose.md), as far
// as nobody says otherwise.
var services = map[byte]string{'E': "encoder", 'P': "prefill", 'D': "decoder"}

// able implements starter. The number is that of the instances with NPUs that show signs of life, and the change.
func (a *advice) able(_ context.Context, node, roles string, more int) (string, bool) {
	n := count(a.beats, node, roles) + more
	service, known := a.targets[roles]
	if !known || strings.Contains(service, "/") { // which is what Kubernetes has
		service = services[roles[0]]
	}
	command := fmt.Sprintf("docker compose up -d --no-recreate --scale %s=%d", service, max(0, n))
	if !known && len(roles) > 1 {
		command += fmt.Sprintf(" # if %s is the service that runs %s: scaler run --target %s=SERVICE names another one", service, roles, roles)
	}
	return command, false
}

// count is how many instances with certain roles a node has that have NPUs; node "" is all nodes.
func count(beats *bus.Instances, node, roles string) (n int) {
	for _, i := range beats.Named() {
		if (node == "" || i.Node == node) && letters(i.Role) == roles && len(i.NPUs) > 0 {
			n++
		}
	}
	return n
}

// letters are the roles of an instance as changes have them.
func letters(role string) string {
	var b strings.Builder
	for _, r := range []string{bus.StageEncode, bus.StagePrefill, bus.StageDecode} {
		if wire.HasRole(role, r) {
			b.WriteString(strings.ToUpper(r[:1]))
		}
	}
	return b.String()
}

// start implements starter.
func (a *advice) start(ctx context.Context, _ *lead.Term, op *lead.Operation, _ string) (Outcome, error) {
	return a.cannot(ctx, op, max(1, op.Change.Count)), nil
}

// stop implements starter.
func (a *advice) stop(ctx context.Context, _ *lead.Term, op *lead.Operation, _ string) (Outcome, error) {
	return a.cannot(ctx, op, -1), nil
}

func (a *advice) cannot(ctx context.Context, op *lead.Operation, more int) Outcome {
	command, _ := a.able(ctx, op.Change.Node, op.Change.Roles, more)
	return Outcome{Why: "nobody here changes the number of processes; run " + command}
}
