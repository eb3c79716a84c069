package composetest

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every metric that the dashboard asks for is one that the program exposes: its name stands in the code.
func TestDashboardAsksForMetricsThatExist(t *testing.T) {
	var code strings.Builder
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		code.Write(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	// Names are written in two parts: a prefix for all of a service, and the rest.
	prefixes := []string{"trireme_hmm_", "trireme_stage_", "trireme_scaler_", "trireme_"}
	asked := map[string]bool{}
	for _, e := range expressions(t) {
		for _, name := range regexp.MustCompile(`trireme_[a-z0-9_]+`).FindAllString(e, -1) {
			asked[name] = true
		}
	}
	if len(asked) < 20 {
		t.Fatalf("the dashboard asks for %d metrics only: the test looks in the wrong place", len(asked))
	}
	for name := range asked {
		found := false
		for _, suffix := range []string{"", "_bucket", "_sum", "_count"} { // of histograms
			whole := strings.TrimSuffix(name, suffix)
			found = found || strings.Contains(code.String(), `"`+whole+`"`)
			for _, p := range prefixes {
				rest, ok := strings.CutPrefix(whole, p)
				found = found || ok && strings.Contains(code.String(), `"`+rest+`"`)
			}
		}
		if !found {
			t.Errorf("the dashboard asks for %s, which nobody exposes", name)
		}
	}
}
