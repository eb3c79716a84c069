package hf_test

import (
	"encoding/binary"
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trireme.dev/shared/hf"
	"trireme.dev/shared/model"
)

const (
	bundled = "../../models/shapes-vl-moe"
	family  = "../testdata/families/qwen3_moe"
)

// open opens a folder until the test ends.
func open(t *testing.T, dir string) *hf.Folder {
	t.Helper()
	f, err := hf.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// load opens a folder and returns its weights.
func load(t *testing.T, dir string) (*hf.Folder, *model.Weights) {
	t.Helper()
	f := open(t, dir)
	w, err := f.Weights()
	if err != nil {
		t.Fatal(err)
	}
	return f, w
}

func TestBundledModel(t *testing.T) {
	f, w := load(t, bundled)
	want := model.Config{
		Name:   "shapes-vl-moe",
		Arch:   hf.ArchQwen3VLMoe,
		Digest: f.Config.Digest,
		Text: model.Text{
			Hidden: 256, Layers: 6, Heads: 8, KVHeads: 2, HeadDim: 32, Vocab: 1024, Context: 8192, RMSEps: 1e-6,
			QKNorm: true, Rope: model.Rope{Theta: 1e5, Sections: []int{6, 5, 5}},
			Experts: 16, TopK: 4, ExpertHidden: 128, NormTopK: true, DenseHidden: 512, Dense: make([]bool, 6),
		},
		Vision: &model.Vision{
			Depth: 6, Hidden: 192, Heads: 6, MLP: 512, Out: 256, Patch: 16, Temporal: 2, Merge: 2, Channels: 3,
			Positions: 256, DeepStack: []int{1, 3, 5}, Theta: 1e4, LayerEps: 1e-6,
			ImageToken: 625, VideoToken: 626, VisionStart: 622, VisionEnd: 623,
		},
	}
	if diff := cmp.Diff(want, f.Config); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
	id, greedy := 619, false
	if diff := cmp.Diff(hf.Generation{DoSample: &greedy, EOS: []int{621, 619}, BOS: &id, PAD: &id}, f.Generation); diff != "" {
		t.Errorf("generation defaults (-want +got):\n%s", diff)
	}

	// Where the last expert's numbers lie, from the definition of the layout [16, 256, 256].
	s, err := hf.OpenSafetensors(filepath.Join(bundled, "model-00002-of-00003.safetensors"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	raw, ok := s.Tensor("model.language_model.layers.3.mlp.experts.gate_up_proj")
	if !ok {
		t.Fatal("no gate_up_proj of layer 3 in the second file")
	}
	at := func(i int) model.BF16 { return model.BF16(binary.LittleEndian.Uint16(raw.Data[2*i:])) }
	x := w.Layers[3].Experts[15]
	for r := range 128 {
		for c := range 256 {
			if x.Gate.Data[r*256+c] != at((15*256+r)*256+c) || x.Up.Data[r*256+c] != at((15*256+128+r)*256+c) {
				t.Fatalf("gate or up of layer 3, expert 15 differs at row %d, column %d", r, c)
			}
		}
	}
	if &w.Embed.Data[0] == &w.LMHead.Data[0] {
		t.Error("the model has an lm_head of its own, but the weights are tied")
	}
}

// TestHubForm writes one model in the form of Qwen3-VL-30B-A3B on the hub and in others, and expects the same weights
// from each.
func TestHubForm(t *testing.T) {
	tests := []struct {
		name  string
		width int
		form  form
	}{
		{"transformers 4, sharded", 24, form{v4: true, shards: 3}},
		{"transformers 4, single file", 24, form{v4: true}},
		{"transformers 5, sharded", 24, form{shards: 2}},
		{"transformers 5, single file", 24, form{}},
		{"transformers 4, 2I = H", 16, form{v4: true, shards: 3}},
		{"transformers 5, 2I = H", 16, form{shards: 3}},
		{"transformers 4, I = H", 32, form{v4: true, shards: 3}},
		{"transformers 5, I = H", 32, form{shards: 3}},
		{"an expert a tensor", 24, form{v4: true, shards: 3, perExpert: true}},
		{"transformers 4, float32", 24, form{v4: true, dtype: "F32"}},
		{"transformers 5, float32", 24, form{dtype: "F32"}},
		{"transformers 4, misaligned", 24, form{v4: true, misaligned: true}},
		{"transformers 5, misaligned", 24, form{misaligned: true, shards: 2}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := newTiny(tt.width)
			f, w := load(t, m.write(t, tt.form))
			if !reflect.DeepEqual(w, &m.weights) {
				t.Error("the weights differ from the model that was written")
			}
			want := model.Config{
				Name:   "tiny",
				Arch:   hf.ArchQwen3VLMoe,
				Digest: f.Config.Digest,
				Text: model.Text{
					Hidden: 32, Layers: 2, Heads: 4, KVHeads: 2, HeadDim: 16, Vocab: 96, Context: 262144, RMSEps: 1e-6,
					QKNorm: true, Rope: model.Rope{Theta: 5e6, Sections: []int{4, 2, 2}},
					Experts: 4, TopK: 2, ExpertHidden: tt.width, NormTopK: true, DenseHidden: 48, Dense: make([]bool, 2),
				},
				Vision: &model.Vision{
					Depth: 3, Hidden: 16, Heads: 2, MLP: 20, Out: 32, Patch: 4, Temporal: 2, Merge: 2, Channels: 3,
					Positions: 9, DeepStack: []int{0, 2}, Theta: 1e4, LayerEps: 1e-6,
					ImageToken: 92, VideoToken: 93, VisionStart: 90, VisionEnd: 91,
				},
			}
			if diff := cmp.Diff(want, f.Config); diff != "" {
				t.Errorf("config (-want +got):\n%s", diff)
			}
		})
	}
}

func TestTied(t *testing.T) {
	// configV4 says that nothing is tied; the missing tensor counts.
	_, w := load(t, newTiny(24).write(t, form{v4: true, shards: 3, tied: true}))
	if &w.Embed.Data[0] != &w.LMHead.Data[0] || w.LMHead.Rows != vocab {
		t.Error("without lm_head.weight, the head is not the embedding")
	}
}

func TestGeneration(t *testing.T) {
	dir := newTiny(24).write(t, form{v4: true})
	sample, temperature, topP, topK, penalty, id := true, 0.7, 0.8, 20, 1.0, 88
	want := hf.Generation{
		DoSample: &sample, Temperature: &temperature, TopP: &topP, TopK: &topK, RepetitionPenalty: &penalty,
		EOS: []int{89, 88}, BOS: &id, PAD: &id,
	}
	if diff := cmp.Diff(want, open(t, dir).Generation); diff != "" {
		t.Errorf("as on the hub (-want +got):\n%s", diff)
	}
	path := filepath.Join(dir, "generation_config.json")
	if err := os.WriteFile(path, []byte(`{"eos_token_id": 7, "min_p": 0.1, "max_new_tokens": 5}`), 0o644); err != nil {
		t.Fatal(err)
	}
	minP, most := 0.1, 5
	if diff := cmp.Diff(hf.Generation{MinP: &minP, MaxNewTokens: &most, EOS: []int{7}, BOS: &id}, open(t, dir).Generation); diff != "" {
		t.Errorf("one end token (-want +got):\n%s", diff)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(hf.Generation{EOS: []int{89}, BOS: &id}, open(t, dir).Generation); diff != "" {
		t.Errorf("without the file (-want +got):\n%s", diff)
	}
}

func TestQwen3Moe(t *testing.T) {
	f, w := load(t, family)
	want := model.Config{
		Name:   "qwen3_moe",
		Arch:   hf.ArchQwen3Moe,
		Digest: f.Config.Digest,
		Text: model.Text{
			Hidden: 128, Layers: 4, Heads: 8, KVHeads: 2, HeadDim: 32, Vocab: 512, Context: 4096, RMSEps: 1e-6,
			QKNorm: true, Rope: model.Rope{Theta: 1e6},
			Experts: 16, TopK: 4, ExpertHidden: 64, NormTopK: true, DenseHidden: 256, Dense: []bool{false, true, false, false},
		},
	}
	if diff := cmp.Diff(want, f.Config); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
	if len(f.Generation.EOS) != 0 || w.Vision != nil {
		t.Errorf("end tokens %v, vision %v; want none", f.Generation.EOS, w.Vision)
	}
	dense := w.Layers[1]
	if dense.Dense == nil || dense.Dense.Down.Rows != 128 || dense.Dense.Down.Cols != 256 || len(dense.Experts) != 0 {
		t.Error("layer 1 is not one MLP of width 256")
	}
	if l := w.Layers[3]; l.Dense != nil || len(l.Experts) != 16 || l.Router.Rows != 16 || len(l.Experts[15].Gate.Data) != 64*128 {
		t.Error("layer 3 does not have 16 experts of width 64")
	}
}

func TestDigest(t *testing.T) {
	m := newTiny(24)
	digest := func(dir string) [32]byte {
		t.Helper()
		c, _, err := hf.ReadConfig(dir)
		if err != nil {
			t.Fatal(err)
		}
		return c.Digest
	}
	one := m.write(t, form{shards: 1})
	base := digest(one)
	if base == ([32]byte{}) || open(t, one).Config.Digest != base {
		t.Error("ReadConfig and Open differ, or there is no digest")
	}
	if digest(m.write(t, form{shards: 3})) != base {
		t.Error("the digest depends on the number of files")
	}
	moved := filepath.Join(t.TempDir(), "another-name")
	if err := os.Rename(one, moved); err != nil {
		t.Fatal(err)
	}
	if digest(moved) != base {
		t.Error("the digest depends on the folder's name")
	}

	path := filepath.Join(moved, "model-00001-of-00001.safetensors")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	changed := digest(moved)
	if changed == base {
		t.Error("another weight, the same digest")
	}
	config := filepath.Join(moved, "config.json")
	editConfig(t, config, config, map[string]any{"text_config.rms_norm_eps": 2e-6})
	if d := digest(moved); d == base || d == changed {
		t.Error("another epsilon, the same digest")
	}
}

func TestProgressAndClose(t *testing.T) {
	f := open(t, newTiny(24).write(t, form{v4: true, shards: 3}))
	var last, total int64
	f.Progress = func(d, n int64) {
		if d <= last || d > n {
			t.Errorf("progress went from %d to %d of %d", last, d, n)
		}
		last, total = d, n
	}
	w, err := f.Weights()
	if err != nil {
		t.Fatal(err)
	}
	if want := int64(layers * experts * 3 * 24 * hidden * 2); total != want || last != total {
		t.Errorf("copied %d of %d bytes, want %d", last, total, want)
	}
	if again, err := f.Weights(); err != nil || again != w {
		t.Errorf("the second call returns %p, %v; want %p", again, err, w)
	}
	for range 2 {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := f.Weights(); err == nil {
		t.Error("a closed folder has weights")
	}
}

// editConfig writes the JSON object of file from to file to with other values; a dot separates the names of nested
// keys, and a nil value removes the key.
func editConfig(t *testing.T, from, to string, edit map[string]any) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	var c map[string]any
	if err := json.Unmarshal(b, &c); err != nil {
		t.Fatal(err)
	}
	for key, v := range edit {
		setKey(c, key, v)
	}
	if b, err = json.Marshal(c); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o644); err != nil {
		t.Fatal(err)
	}
}
