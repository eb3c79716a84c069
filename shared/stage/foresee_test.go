package stage_test

import (
	"encoding/hex"
	"testing"

	"trireme.dev/models"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/stage"
)

// What new instances are said to need is what the parts of the model have, shared where NPUs are one domain, and nothing where it is there.
func TestForesee(t *testing.T) {
	dir, err := models.Unpack(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	f, err := hf.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size := func(part hf.Parts, wanted hf.Experts) (bytes int64, has hbm.WeightsStats) {
		set, err := f.Needs(part, wanted)
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range set.Sizes {
			bytes += n
		}
		return bytes, hbm.WeightsStats{Key: hex.EncodeToString(set.Key[:]), Domain: 1, Objects: len(set.Numbers), Bytes: bytes, Loaded: bytes}
	}
	text, whole := size(hf.Text, nil)
	vision, _ := size(hf.Vision, nil)
	dense, some := size(hf.Text, func(int, int) bool { return false })
	half := whole
	half.Loaded /= 2
	for name, c := range map[string]struct {
		roles        string
		npus, more   int
		perNPU       bool
		has          []hbm.WeightsStats
		needs, fresh int64
	}{
		"a decoder":                        {stage.Decode, 1, 1, false, nil, text, text},
		"an encoder":                       {stage.Encode, 1, 1, false, nil, vision, vision},
		"all roles":                        {"encode+prefill+decode", 1, 1, false, nil, text + vision, text + vision},
		"two in one domain":                {stage.Prefill, 1, 2, false, nil, text, text},
		"two in two":                       {stage.Prefill, 1, 2, true, nil, text, 2 * text},
		"of two NPUs":                      {stage.Decode, 2, 1, false, nil, text, text},
		"of two NPUs with a domain each":   {stage.Decode, 2, 1, true, nil, text + dense, text + dense},
		"all is there":                     {stage.Decode, 1, 3, false, []hbm.WeightsStats{whole}, text, 0},
		"in another domain":                {stage.Decode, 1, 2, true, []hbm.WeightsStats{whole}, text, text},
		"it is being loaded":               {stage.Decode, 1, 1, false, []hbm.WeightsStats{half}, text, text},
		"a part is there, who knows which": {stage.Decode, 1, 1, false, []hbm.WeightsStats{some}, text, text},
	} {
		var npus [][]int
		for i := range c.more {
			npus = append(npus, []int{2 * i, 2*i + 1}[:c.npus])
		}
		domain := func(npu int) int {
			if c.perNPU {
				return 1 + npu
			}
			return 1
		}
		needs, fresh, err := stage.Foresee(f, c.roles, npus, domain, c.has)
		if err != nil || needs != c.needs || fresh != c.fresh {
			t.Errorf("%s: %d bytes, %d of them fresh, %v; want %d, %d", name, needs, fresh, err, c.needs, c.fresh)
		}
	}
}
