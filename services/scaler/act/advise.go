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
type advice struct{ beats *bus.Instances }

// services are the services of compose.yaml by the first of their roles: one with several runs in the place of that
// (docs/compose.md).
var services = map[byte]string{'E': "encoder", 'P': "prefill", 'D': "decoder"}

// able implements starter. The number is that of the instances with NPUs that show signs of life, and the change.
func (a *advice) able(_ context.Context, node, roles string, more int) (string, bool) {
	n := count(a.beats, node, roles) + more
	return fmt.Sprintf("docker compose up -d --no-recreate --scale %s=%d", services[roles[0]], max(0, n)), false
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
