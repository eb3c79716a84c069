package chat

import (
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/nikolalohinski/gonja/v2/exec"
)

// TestAgainstJinja2 compares with what Jinja2 itself made (see testdata/make_jinja2.py).
func TestAgainstJinja2(t *testing.T) {
	data, err := os.ReadFile("testdata/jinja2.json")
	if err != nil {
		t.Fatal(err)
	}
	var golden struct {
		Variables json.RawMessage `json:"variables"`
		Cases     []struct {
			Template string  `json:"template"`
			Output   *string `json:"output"`
			Raised   string  `json:"raised"`
		} `json:"cases"`
	}
	if err := json.Unmarshal(data, &golden); err != nil {
		t.Fatal(err)
	}
	variables, err := decode(golden.Variables)
	if err != nil {
		t.Fatal(err)
	}
	kwargs := map[string]any{}
	for _, p := range variables.(*exec.Dict).Pairs {
		kwargs[p.Key.String()] = p.Value.Interface()
	}
	if len(golden.Cases) < 80 {
		t.Fatalf("only %d cases", len(golden.Cases))
	}
	for _, c := range golden.Cases {
		tpl, err := Parse(c.Template)
		if err != nil {
			t.Errorf("%q: %v", c.Template, err)
			continue
		}
		got, err := tpl.execute(get(variables, "messages").(list), Options{Kwargs: kwargs}, nil)
		switch {
		case c.Output == nil:
			if !errors.Is(err, ErrRaised) || !strings.Contains(err.Error(), c.Raised) {
				t.Errorf("%q: error %v, want one that says %q", c.Template, err, c.Raised)
			}
		case err != nil:
			t.Errorf("%q: %v", c.Template, err)
		case got != *c.Output:
			t.Errorf("%q\n got %q\nwant %q", c.Template, got, *c.Output)
		}
	}
}
