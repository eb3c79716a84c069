package wellformed_test

import (
	"errors"
	"testing"

	"github.com/vmihailenco/msgpack/v5"

	"trireme.dev/shared/wellformed"
)

func TestMsgpack(t *testing.T) {
	good, err := msgpack.Marshal([]any{1, -70000, "text", []byte{1, 2}, nil, true, 1.5, float32(2), map[string]int{"a": 1}, []int{1 << 40}})
	if err != nil {
		t.Fatal(err)
	}
	if err := wellformed.Msgpack(good, 100); err != nil {
		t.Errorf("a good message: %v", err)
	}
	for i := range good {
		if err := wellformed.Msgpack(good[:i], 100); !errors.Is(err, wellformed.ErrMalformed) {
			t.Errorf("cut to %d bytes: %v", i, err)
		}
	}
	if err := wellformed.Msgpack(good, 9); !errors.Is(err, wellformed.ErrMalformed) {
		t.Errorf("10 elements where 9 are allowed: %v", err)
	}
	deep := append(make([]byte, 0, 100), 0)
	for range 50 {
		deep = append([]byte{0x91}, deep...)
	}
	for name, p := range map[string][]byte{
		"empty":                {},
		"a byte too many":      append(append([]byte{}, good...), 0),
		"four billion entries": {0xdd, 0xff, 0xff, 0xff, 0xff},
		"two billion pairs":    {0xdf, 0x7f, 0xff, 0xff, 0xff},
		"never used format":    {0xc1},
		"extension":            {0xd4, 1, 2},
		"deep":                 deep,
	} {
		if err := wellformed.Msgpack(p, 1<<30); !errors.Is(err, wellformed.ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What passes can be decoded without a panic, and within memory.
func FuzzMsgpack(f *testing.F) {
	f.Add([]byte{0x92, 0xa1, 'x', 0x80})
	f.Add([]byte{0xdd, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(_ *testing.T, p []byte) {
		if wellformed.Msgpack(p, 1000) == nil {
			var v any
			_ = msgpack.Unmarshal(p, &v)
		}
	})
}
