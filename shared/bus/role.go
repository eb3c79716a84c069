package bus

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"trireme.dev/shared/wire"
)

// RoleSwitch asks for an NPU to go over to an instance of a role.
type RoleSwitch struct {
	Node     string
	NPU      int
	Role     string      // as of an instance: prefill, or encode+prefill
	Instance string      // id or name of the one that it is to join; "": the one of the role and node that has the fewest NPUs
	Change   wire.Change // how: Left (for all of it), Rate, Spare, Slack, DryRun
}

// RoleReport is what became of a RoleSwitch.
type RoleReport struct {
	NPU   string             `json:"npu"` // node/index
	Role  string             `json:"role"`
	Leave *wire.ChangeReport `json:"leave"` // of the instance that had the NPU; null: nobody had it
	Join  *wire.ChangeReport `json:"join"`  // of the one that is to have it; null: not begun
	Moves bool               `json:"something_to_do"`
}

var roleLetters = map[rune]string{'E': StageEncode, 'P': StagePrefill, 'D': StageDecode}

// RoleNamed is the role that an operator means by encoder, prefill, decoder, or by letters such as EP.
func RoleNamed(word string) (string, error) {
	var roles []string
	for _, letter := range RoleLetters(word) {
		role := roleLetters[letter]
		if role == "" || slices.Contains(roles, role) {
			roles = nil
			break
		}
		roles = append(roles, role)
	}
	if len(roles) == 0 {
		return "", notMeant(fmt.Sprintf("no role is called %q: write encoder, prefill or decoder, or letters such as EP", word))
	}
	return strings.Join(roles, wire.RoleSeparator), nil
}

// taker is the instance that an NPU is to join.
func (q *RoleSwitch) taker(all []wire.Instance) (*wire.Instance, error) {
	var found []wire.Instance
	for _, i := range all {
		named := q.Instance == "" || q.Instance == i.ID || i.Name != "" && q.Instance == i.Name
		if i.Node == q.Node && i.Role == q.Role && i.Ready && named {
			found = append(found, i)
		}
	}
	if len(found) == 0 {
		return nil, notMeant(fmt.Sprintf("no instance on node %s is %s alone and ready%s: have one that stands by (`trireme up --topology …,1Dx0`), or start "+
			"one on a spare NPU (`trireme scale … --replicas`)", q.Node, strings.ReplaceAll(q.Role, wire.RoleSeparator, " and "),
			map[bool]string{true: " as " + q.Instance}[q.Instance != ""]))
	}
	return new(slices.MinFunc(found, func(a, b wire.Instance) int {
		return cmp.Or(len(a.NPUs)-len(b.NPUs), strings.Compare(a.ID, b.ID))
	})), nil
}

// ownerWait bounds the question who has an NPU.
const ownerWait = 5 * time.Second

// owner asks the HMM of a node who has an NPU; "": it is spare, or kept for somebody.
func (b *Bus) owner(ctx context.Context, node string, npu int) (instance string, err error) {
	ctx, cancel := context.WithTimeout(ctx, ownerWait)
	defer cancel()
	err = notMeant(fmt.Sprintf("no HMM of a node %s answers: `trireme status` shows the nodes that there are", node))
	if asked := b.AskAll(ctx, wire.SubjectHMM, struct{}{}, func(data []byte) (more bool) {
		var s struct { // of hbm.Stats
			Node   string
			Memory []struct {
				NPU      int
				Instance string
			}
		}
		if json.Unmarshal(data, &s) != nil || s.Node != node {
			return true
		}
		err = notMeant(fmt.Sprintf("node %s has no NPU %d; `trireme status` shows those that it has", node, npu))
		for _, m := range s.Memory {
			if m.NPU == npu && npu >= 0 {
				instance, err = m.Instance, nil
			}
		}
		return false
	}); asked != nil {
		return "", asked
	}
	return instance, err
}

// SwitchRole has an NPU leave the instance that has it, if any, and then join one of a role, kept for that one in between as long as the HMM keeps
// NPUs of instances that have ended. These are two operations: who asks may go away between them, or the second may fail, and then the NPU is spare.
// all are the heartbeats. told gets each report on the way.
func (b *Bus) SwitchRole(ctx context.Context, all []wire.Instance, q RoleSwitch, told func(*wire.ChangeReport)) (*RoleReport, error) {
	r := &RoleReport{NPU: fmt.Sprintf("%s/%d", q.Node, q.NPU), Role: q.Role}
	began := time.Now()
	owner, err := b.owner(ctx, q.Node, q.NPU)
	if err != nil {
		return r, err
	}
	has := slices.IndexFunc(all, func(i wire.Instance) bool { return owner != "" && i.ID == owner })
	if owner != "" && has < 0 {
		return r, fmt.Errorf("NPU %s is %s's, which shows no sign of life: try again when it has one, or when the NPU is spare", r.NPU, owner)
	}
	if owner != "" && all[has].Role == q.Role && (q.Instance == "" || q.Instance == all[has].ID || q.Instance == all[has].Name) {
		return r, nil
	}
	to, err := q.taker(all)
	if err != nil {
		return r, err
	}
	r.Moves = true
	change := q.Change
	change.Kind = wire.ChangeScale
	if owner != "" {
		from := &all[has]
		change.ID, change.Leave, change.For = NewChangeID(), []int{q.NPU}, to.Name
		if r.Leave, err = b.Change(ctx, from.ID, from.Record(), change, told); err != nil {
			return r, err
		}
		change.Leave, change.For = nil, ""
		change.Hold, change.HoldTime = "", 0 // tests hold the first operation
	}
	change.ID, change.Join = NewChangeID(), []int{q.NPU}
	change.Left = max(time.Millisecond, change.Left-time.Since(began))
	r.Join, err = b.Change(ctx, to.ID, to.Record(), change, told)
	if err != nil && !q.Change.DryRun && (errors.Is(err, ErrRefused) || errors.Is(err, ErrGivenUp)) {
		err = fmt.Errorf("NPU %s is spare: %w", r.NPU, err)
	}
	return r, err
}
