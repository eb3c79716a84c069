package scaler

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"trireme.dev/shared/sched/autoscale"
)

// A file that changes is told once, and one that cannot be used once for each way in which it cannot.
func TestPolicyFileIsReadAgain(t *testing.T) {
	t.Parallel()
	name := filepath.Join(t.TempDir(), "scaler.yaml")
	f := policyFile{name: name}
	write := func(text string) {
		t.Helper()
		next := name + ".next"
		if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(next, name); err != nil { // never half of it
			t.Fatal(err)
		}
	}
	expect := func(changed bool, budget int, wrong string) {
		t.Helper()
		p, news, err := f.load()
		switch {
		case news != changed:
			t.Errorf("news %v, want %v: %v", news, changed, err)
		case wrong == "" && err != nil, wrong != "" && (err == nil || !strings.Contains(err.Error(), wrong) || !strings.Contains(err.Error(), name)):
			t.Errorf("%v, want %q", err, wrong)
		case changed && wrong == "" && p.Budget != budget:
			t.Errorf("the budget is %d, want %d", p.Budget, budget)
		}
	}
	expect(true, 0, "no such file")
	expect(false, 0, "no such file")
	write("budget: 4")
	expect(true, 4, "")
	expect(false, 4, "")
	write("budget: many")
	expect(true, 0, "many")
	if _, _, err := f.load(); !errors.Is(err, autoscale.ErrPolicy) {
		t.Errorf("%v", err)
	}
	expect(false, 0, "many")
	write("budget: more")
	expect(true, 0, "more")
	write("budget: 4") // as it was: the policy in force is told again
	expect(true, 4, "")
	expect(false, 4, "")
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	expect(true, 0, "no such file")
}

// The mode of the command line stands above the file's, also when that changes; without a file it is the default policy.
func TestModeAboveThePolicy(t *testing.T) {
	t.Parallel()
	f := policyFile{mode: autoscale.Auto}
	if p, news, err := f.load(); err != nil || !news || p.Mode != autoscale.Auto || p.Targets != autoscale.Default().Targets {
		t.Errorf("%+v, %v, %v", p, news, err)
	}
	if _, news, err := f.load(); err != nil || news {
		t.Errorf("news %v, %v", news, err)
	}
	name := filepath.Join(t.TempDir(), "scaler.yaml")
	if err := os.WriteFile(name, []byte("mode: off"), 0o600); err != nil {
		t.Fatal(err)
	}
	for mode, want := range map[autoscale.Mode]autoscale.Mode{"": autoscale.Off, autoscale.Advise: autoscale.Advise} {
		f := policyFile{name: name, mode: mode}
		if p, _, err := f.load(); err != nil || p.Mode != want {
			t.Errorf("mode %q: %q, %v", mode, p.Mode, err)
		}
	}
}
