package gateway

import (
	"testing"

	"trireme.dev/services/gateway/admission"
	"trireme.dev/shared/wire"
)

// An NPU counts once, whatever its instance does with it, and one that stands by has none.
func TestCountNPUs(t *testing.T) {
	wide := wire.Instance{ID: "wide", Role: "encode+prefill", NPUs: []int{0, 1, 2}}
	prefill := wire.Instance{ID: "other", Role: "prefill", NPUs: []int{0}} // of another node
	standby := wire.Instance{ID: "standby", Role: "prefill", Standby: true}
	if n := countNPUs([]wire.Instance{wide}, []wire.Instance{wide, prefill, standby}); n != 4 {
		t.Errorf("%d NPUs, want 4", n)
	}
	if n := countNPUs(nil, []wire.Instance{standby}); n != 0 {
		t.Errorf("%d NPUs of a standby", n)
	}
}

// What there is for KV and pictures follows from the roles of the instances that have the NPUs.
func TestCapacitiesFollowRoles(t *testing.T) {
	for name, x := range map[string]struct {
		roles map[string]string // of each instance, which has one NPU of 100 bytes; of "big" 300
		want  admission.Capacity
		rooms rooms
	}{
		"1E1P1D":         {map[string]string{"a": "E", "b": "P", "c": "D"}, admission.Capacity{KV: 100, MM: 100}, rooms{100, 100, 100}},
		"2E1P3D":         {map[string]string{"a": "E", "b": "E", "c": "P", "d": "D", "e": "D", "big": "D"}, admission.Capacity{KV: 500, MM: 100}, rooms{100, 100, 100}},
		"1EPD":           {map[string]string{"a": "EPD"}, admission.Capacity{KV: 100, MM: 100, Both: 100, Prompt: 100}, rooms{100, 100, 100}},
		"2EPD":           {map[string]string{"a": "EPD", "big": "EPD"}, admission.Capacity{KV: 400, MM: 400, Both: 400, Prompt: 400}, rooms{100, 100, 100}},
		"1EP1D":          {map[string]string{"a": "EP", "b": "D"}, admission.Capacity{KV: 100, MM: 100, Prompt: 100}, rooms{100, 100, 100}},
		"1E1PD":          {map[string]string{"big": "E", "b": "PD"}, admission.Capacity{KV: 100, MM: 100, Both: 100}, rooms{300, 100, 100}},
		"1ED1P":          {map[string]string{"a": "ED", "big": "P"}, admission.Capacity{KV: 100, MM: 100, Both: 100}, rooms{100, 300, 100}},
		"1EPD1D":         {map[string]string{"a": "EPD", "b": "D"}, admission.Capacity{KV: 200, MM: 100, Both: 200, Prompt: 100}, rooms{100, 100, 100}},
		"nobody known":   {map[string]string{"a": "", "b": ""}, admission.Capacity{KV: 200, MM: 200}, rooms{100, 100, 100}},
		"no encoder":     {map[string]string{"a": "P", "b": "D"}, admission.Capacity{KV: 100, MM: 100}, rooms{100, 100, 100}},
		"a spare beside": {map[string]string{"a": "PD", "b": "E", "spare": ""}, admission.Capacity{KV: 100, MM: 100, Both: 100}, rooms{100, 100, 100}},
	} {
		var npus []NPUCapacity
		for id := range x.roles {
			n := NPUCapacity{Instance: id, Bytes: 100}
			if id == "big" {
				n.Bytes = 300
			}
			npus = append(npus, n)
		}
		letters := map[string]rune{"encode": 'E', "prefill": 'P', "decode": 'D'}
		r, c := capacities(npus, func(role string) map[string]bool {
			has := map[string]bool{}
			for id, roles := range x.roles {
				for _, l := range roles {
					has[id] = has[id] || l == letters[role]
				}
			}
			return has
		})
		if c != x.want || r != x.rooms {
			t.Errorf("%s: %+v and %+v, want %+v and %+v", name, c, r, x.want, x.rooms)
		}
	}
}
