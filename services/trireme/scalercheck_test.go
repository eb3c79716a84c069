package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestScalerCheck(t *testing.T) {
	file := filepath.Join(t.TempDir(), "scaler.yaml")
	for text, want := range map[string]struct {
		status int
		say    string
	}{
		"":                   {0, "Decisions are told and not carried out"},
		"budget: 8":          {0, "at most 8 NPUs"},
		"mode: auto\nx: 1\n": {exitUsage, "line 2: there is no key x"},
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var out, errOut bytes.Buffer
		status := run([]string{"scaler", "check", file}, nil, &out, &errOut)
		if said := out.String() + errOut.String(); status != want.status || !strings.Contains(said, want.say) {
			t.Errorf("%q: status %d, %q; want %d and %q", text, status, said, want.status, want.say)
		}
	}
	if status := run([]string{"scaler", "check", file + ".gone"}, nil, new(bytes.Buffer), new(bytes.Buffer)); status != exitUsage {
		t.Errorf("a file that is not there: status %d", status)
	}
}
