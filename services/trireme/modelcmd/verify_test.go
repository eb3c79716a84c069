package modelcmd_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"trireme.dev/services/trireme/modelcmd"
	"trireme.dev/shared/hf"
)

// verify runs the command and returns what it wrote.
func verify(c modelcmd.Verify) (string, error) {
	var out, progress bytes.Buffer
	err := c.Run(modelcmd.Streams{In: strings.NewReader(""), Out: &out, Err: &progress})
	if progress.Len() > 0 {
		err = errors.Join(err, fmt.Errorf("wrote to stderr, which is no terminal: %q", progress.String()))
	}
	return out.String(), err
}

// verifyJSON runs the command with --json.
func verifyJSON(t *testing.T, c modelcmd.Verify) (modelcmd.Report, error) {
	t.Helper()
	c.JSON = true
	out, runErr := verify(c)
	var r modelcmd.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v in %q (error of the run: %v)", err, out, runErr)
	}
	return r, runErr
}

// TestVerifyBundled runs all golden cases of the bundled model.
func TestVerifyBundled(t *testing.T) {
	r, err := verifyJSON(t, modelcmd.Verify{Dir: bundled, Golden: golden})
	if err != nil {
		t.Error(err)
	}
	if len(r.Cases) != 24 || r.Passed != 24 || r.Failed != 0 {
		t.Errorf("%d cases, %d passed, %d failed; want 24, all passed", len(r.Cases), r.Passed, r.Failed)
	}
	compared := map[string]int{}
	for _, c := range r.Cases {
		if !c.OK || !c.IDs || len(c.Problems) > 0 {
			t.Errorf("%+v", c)
		}
		for _, tensor := range c.Tensors {
			compared[tensor.Name]++
		}
	}
	want := map[string]int{
		"pixel_values": 3, "image_embeds": 3, "deepstack_0": 3, "deepstack_1": 3, "deepstack_2": 3, "logits": 4,
		"router_logits_0": 4, "router_logits_1": 4, "router_logits_2": 4, "router_logits_3": 4, "router_logits_4": 4, "router_logits_5": 4,
	}
	for name, n := range want {
		if compared[name] != n {
			t.Errorf("%s was compared %d times, want %d", name, compared[name], n)
		}
	}
	if compared["last_logits_top8"] < 15 {
		t.Errorf("the last logits were compared in %d cases only", compared["last_logits_top8"])
	}
}

// TestVerifyFamily runs the form with golden.json, and checks the lines for people.
func TestVerifyFamily(t *testing.T) {
	out, err := verify(modelcmd.Verify{Dir: family, Golden: family})
	if err != nil {
		t.Error(err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 3 {
		t.Fatalf("%d lines, want one for each of two cases and a summary:\n%s", len(lines), out)
	}
	for i, line := range lines[:2] {
		if !strings.HasPrefix(line, fmt.Sprintf("ok   golden%d  ids equal (24)  logits ", i)) {
			t.Errorf("line %d: %s", i, line)
		}
	}
	if !strings.HasPrefix(lines[2], "2 of 2 cases of qwen3_moe agree with ") {
		t.Errorf("summary: %s", lines[2])
	}
}

// oneCase writes a golden folder with case06 of the bundled model, which has a picture and all tensors.
func oneCase(t *testing.T) (dir string, c map[string]any) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range []string{"case06.safetensors", "case06_0.png"} {
		copyFile(t, filepath.Join(golden, name), filepath.Join(dir, name))
	}
	b, err := os.ReadFile(filepath.Join(golden, "cases.json"))
	if err != nil {
		t.Fatal(err)
	}
	var cases []map[string]any
	if err := json.Unmarshal(b, &cases); err != nil {
		t.Fatal(err)
	}
	return dir, cases[6]
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// writeCases writes cases.json.
func writeCases(t *testing.T, dir string, cases ...map[string]any) {
	t.Helper()
	b, err := json.Marshal(cases)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "cases.json"), b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// shift adds delta to one float32 of a tensor in the safetensors file of case06.
func shift(t *testing.T, dir, tensor string, element int, delta float32) {
	t.Helper()
	path := filepath.Join(dir, "case06.safetensors")
	s, err := hf.OpenSafetensors(path)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	x, ok := s.Tensor(tensor)
	if !ok {
		t.Fatalf("no tensor %s", tensor)
	}
	at := bytes.Index(b, x.Data) + 4*element
	v := math.Float32frombits(binary.LittleEndian.Uint32(b[at:])) + delta
	binary.LittleEndian.PutUint32(b[at:], math.Float32bits(v))
	if err := os.Remove(path); err != nil { // a new file, for the old one is mapped
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// ids returns a list of ids of a case, to be changed.
func ids(c map[string]any, key string) []any { return c[key].([]any) }

// TestVerifyDamaged changes the reference in one place and expects that place to be named.
func TestVerifyDamaged(t *testing.T) {
	nan := float32(math.NaN())
	tests := []struct {
		name   string
		damage func(t *testing.T, dir string, c map[string]any)
		text   string // in the line of the case; "" where nothing is wrong
	}{
		{"nothing", func(*testing.T, string, map[string]any) {}, ""},
		{"last greedy id", func(_ *testing.T, _ string, c map[string]any) { ids(c, "output_ids")[8] = 7 }, "ids DIFFER (9)"},
		{"prompt id", func(_ *testing.T, _ string, c map[string]any) { ids(c, "input_ids")[17] = 7 }, "prompt ids differ from token 17 of 28 on"},
		{"grid", func(_ *testing.T, _ string, c map[string]any) { c["image_grid_thw"] = [][]int{{1, 6, 8}} }, "patch grids are [{1 8 6}], want [{1 6 8}]"},
		{"pixel", func(t *testing.T, dir string, _ map[string]any) { shift(t, dir, "pixel_values", 100, 2e-5) }, "pixel_values 2.0e-05 BEYOND 1.0e-05"},
		{"embedding", func(t *testing.T, dir string, _ map[string]any) { shift(t, dir, "image_embeds", 5, 1e-3) }, "image_embeds 1.0e-03 BEYOND 5.0e-04"},
		{"deepstack", func(t *testing.T, dir string, _ map[string]any) { shift(t, dir, "deepstack_2", 3071, -1e-3) }, "deepstack_2 1.0e-03 BEYOND"},
		{"router", func(t *testing.T, dir string, _ map[string]any) { shift(t, dir, "router_logits_5", 447, 1e-3) }, "router_logits_5 1.0e-03 BEYOND"},
		{"logits", func(t *testing.T, dir string, _ map[string]any) { shift(t, dir, "logits", 28*1024-1, 1e-3) }, "logits 1.0e-03 BEYOND"},
		{"not a number", func(t *testing.T, dir string, _ map[string]any) { shift(t, dir, "logits", 0, nan) }, "logits 1.8e+308 BEYOND"},
		{"last logits", func(_ *testing.T, _ string, c map[string]any) {
			c["last_logits_top8"].(map[string]any)["values"].([]any)[7] = 9.5
		}, "last_logits_top8 8.4e+00 BEYOND"},
		{"another picture", func(t *testing.T, dir string, _ map[string]any) {
			copyFile(t, filepath.Join(golden, "case13_0.png"), filepath.Join(dir, "case06_0.png"))
		}, "BEYOND"},
		{"no picture", func(t *testing.T, dir string, _ map[string]any) {
			if err := os.Remove(filepath.Join(dir, "case06_0.png")); err != nil {
				t.Fatal(err)
			}
		}, "no such file"},
		{"picture is no picture", func(t *testing.T, dir string, _ map[string]any) {
			copyFile(t, filepath.Join(golden, "cases.json"), filepath.Join(dir, "case06_0.png"))
		}, "case06_0.png"},
		{"cut tensors", func(t *testing.T, dir string, _ map[string]any) {
			if err := os.Truncate(filepath.Join(dir, "case06.safetensors"), 5000); err != nil {
				t.Fatal(err)
			}
		}, "damaged safetensors file"},
		{"tensors of another case", func(t *testing.T, dir string, _ map[string]any) {
			copyFile(t, filepath.Join(golden, "case09.safetensors"), filepath.Join(dir, "case06.safetensors"))
		}, "logits NOT COMPARED: it has shape [37 1024], want 28672 elements"},
		{"another question", func(_ *testing.T, _ string, c map[string]any) {
			c["messages"] = []any{map[string]any{"role": "user", "content": "Hello!"}}
		}, "the prompt has placeholders for 0 of 1 pictures"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir, c := oneCase(t)
			tt.damage(t, dir, c)
			writeCases(t, dir, c)
			out, err := verify(modelcmd.Verify{Dir: bundled, Golden: dir})
			if tt.text == "" {
				if err != nil || !strings.HasPrefix(out, "ok ") {
					t.Errorf("%v\n%s", err, out)
				}
				return
			}
			if !errors.Is(err, modelcmd.ErrDiffers) {
				t.Errorf("error %v, want one that wraps: %v", err, modelcmd.ErrDiffers)
			}
			line, _, _ := strings.Cut(out, "\n")
			if !strings.HasPrefix(line, "FAIL case06") || !strings.Contains(line, tt.text) {
				t.Errorf("%s\ndoes not say: %s", line, tt.text)
			}
			if !strings.Contains(out, "0 of 1 cases of shapes-vl-moe agree") {
				t.Errorf("no summary:\n%s", out)
			}
		})
	}
}

// TestVerifyUnusable is about folders from which no case can be read.
func TestVerifyUnusable(t *testing.T) {
	write := func(name, content string) string {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	for dir, text := range map[string]string{
		t.TempDir():                               "neither cases.json nor golden.json is there",
		write("cases.json", "{"):                  "cases.json: unexpected end",
		write("cases.json", "[]"):                 "no cases",
		write("cases.json", `[{"name": "../x"}]`): `case 0 has the name "../x"`,
		write("cases.json", `[{"name": "x"}]`):    "case x has no input_ids",
		write("golden.json", `{"cases": [{}]}`):   "case golden0 has no input_ids",
		write("golden.json", `{"cases": "many"}`): "golden.json: json: cannot unmarshal",
		write("cases.json", `[{"name": "x", "input_ids": [1], "output_ids": [1], "images": ["/etc/passwd"]}]`): "is not a file in the folder",
	} {
		_, err := verify(modelcmd.Verify{Dir: bundled, Golden: dir})
		if !errors.Is(err, modelcmd.ErrGolden) || !strings.Contains(err.Error(), text) {
			t.Errorf("%v\ndoes not say: %s", err, text)
		}
	}
	if _, err := verify(modelcmd.Verify{Dir: t.TempDir(), Golden: golden}); err == nil || !strings.Contains(err.Error(), "config.json") {
		t.Errorf("a folder without a model: %v", err)
	}
}
