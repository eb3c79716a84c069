package bus

import (
	"errors"
	"testing"

	"trireme.dev/shared/wire"
)

func TestRoleNamed(t *testing.T) {
	for word, want := range map[string]string{
		"encoder": "encode", "prefill": "prefill", "decoder": "decode", "EP": "encode+prefill", "EPD": "encode+prefill+decode", "D": "decode",
		"": "", "gateway": "", "EE": "", "decode": "",
	} {
		if got, err := RoleNamed(word); got != want || (err != nil) != (want == "") {
			t.Errorf("%q is %q, %v; want %q", word, got, err, want)
		}
	}
}

// An NPU joins the instance of exactly the role, on its node, that has the fewest NPUs, or the one that is named.
func TestTaker(t *testing.T) {
	all := []wire.Instance{
		{ID: "d0", Name: "decoder-0", Role: "decode", Node: "n", NPUs: []int{1, 2}, Ready: true},
		{ID: "d1", Name: "decoder-1", Role: "decode", Node: "n", Ready: true, Standby: true},
		{ID: "d2", Role: "decode", Node: "m", Ready: true},
		{ID: "p0", Role: "prefill", Node: "n", NPUs: []int{3}},
		{ID: "s0", Role: "encode+decode", Node: "n", NPUs: []int{4}, Ready: true},
	}
	for _, x := range []struct{ node, role, instance, want string }{
		{"n", "decode", "", "d1"}, {"n", "decode", "decoder-0", "d0"}, {"n", "decode", "d0", "d0"}, {"m", "decode", "", "d2"},
		{"n", "encode+decode", "", "s0"}, {"n", "decode", "d2", ""}, {"n", "prefill", "", ""}, {"n", "encode", "", ""}, {"n", "decode", "s0", ""},
	} {
		q := RoleSwitch{Node: x.node, Role: x.role, Instance: x.instance}
		got, err := q.taker(all)
		switch {
		case x.want == "" && !errors.Is(err, ErrNoInstance):
			t.Errorf("%+v: %+v, %v", x, got, err)
		case x.want != "" && (err != nil || got.ID != x.want):
			t.Errorf("%+v: %+v, %v", x, got, err)
		}
	}
}
