package placement

import (
	"errors"
	"math/rand/v2"
	"reflect"
	"testing"
)

func TestEncode(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		experts := make([]int, rng.IntN(5))
		layout := make(Layout, len(experts))
		copies := 0
		for l := range experts {
			experts[l] = rng.IntN(40) // 0: dense
			layout[l] = make([]Set, experts[l])
			for e := range layout[l] {
				layout[l][e] = Of(rng.IntN(MaxNPUs), rng.IntN(MaxNPUs), rng.IntN(MaxNPUs))
				copies += layout[l][e].Len()
			}
		}
		data := layout.Encode()
		if len(data) != copies {
			t.Fatalf("%d copies take %d bytes", copies, len(data))
		}
		got, err := Decode(data, experts)
		if err != nil || !reflect.DeepEqual(got, layout) {
			t.Fatalf("%v became %v, %v", layout, got, err)
		}
		if _, err := Decode(append(data, last), experts); !errors.Is(err, ErrEncoded) {
			t.Errorf("a byte too many: %v", err)
		}
		if copies > 0 {
			if _, err := Decode(data[:rng.IntN(len(data))], experts); !errors.Is(err, ErrEncoded) {
				t.Errorf("bytes are missing: %v", err)
			}
		}
	}
	for _, data := range [][]byte{{1, 1 | last}, {MaxNPUs | last}} {
		if _, err := Decode(data, []int{1}); !errors.Is(err, ErrEncoded) {
			t.Errorf("%v: %v", data, err)
		}
	}
}
