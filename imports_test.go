// Package trireme_test holds the rules of the house that a compiler does not check.
package trireme_test

import (
	"go/ast"
	"go/build"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "trireme.dev/"

// rule says what the packages under a path may not import (test files are free to).
type rule struct {
	path    string   // package path below the module, itself and everything under it
	except  []string // packages under path that the rule is not for
	forbid  []string // import path prefixes; those of this module without the module's name
	because string
}

var rules = []rule{
	{path: "shared", forbid: []string{"services/", "models"}, because: "shared code knows no service"},
	{path: "shared/engine", forbid: []string{
		"shared/kernel/", "shared/mem/", "shared/hbm", "shared/bus", "shared/wire", "shared/hf", "shared/npu",
	}, because: "the engine knows kernels and memory by interface only"},
	{path: "shared/kernel", forbid: []string{"shared/engine", "shared/npu", "shared/hbm", "shared/bus"},
		because: "backends import interfaces, never the reverse"},
	{path: "shared/model", forbid: []string{"shared/", "os", "io", "net"}, because: "a model is pure values"},
	{path: "shared/mem", forbid: []string{"shared/hbm", "shared/engine", "shared/kernel", "shared/bus"},
		because: "memory is named here, not used"},
	{path: "shared/sched", forbid: []string{
		"shared/bus", "shared/wire", "shared/hbm", "shared/mem", "shared/engine", "shared/kernel", "shared/npu", "shared/stage",
		"log", "sync", "context", "os", "io", "net", "github.com",
	}, because: "decisions are pure: the simulator makes the same"},
	{path: "shared/plan", forbid: []string{
		"shared/bus", "shared/wire", "shared/hbm", "shared/mem", "shared/engine", "shared/kernel", "shared/npu", "shared/stage",
		"log", "sync", "context", "os", "io", "net", "github.com",
	}, because: "planning is arithmetic"},
	{path: "services", forbid: []string{"shared/mem/cuda"}, because: "the binary stays static"},
	{path: "services/gateway", forbid: []string{"shared/engine", "shared/kernel", "shared/npu", "shared/stage"},
		because: "the gateway runs no model"},
	{path: "services/hmm", forbid: []string{"shared/engine", "shared/kernel", "shared/npu", "shared/stage"},
		because: "the HMM never computes"},
	{path: "shared", except: []string{"shared/npu"}, forbid: []string{"shared/kernel/cpu", "shared/kernel/ref"},
		because: "backends are chosen in shared/npu alone"},
}

func TestImportsFollowTheLayout(t *testing.T) {
	checked := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		if name := d.Name(); path != "." && (strings.HasPrefix(name, ".") || name == "testdata") {
			return fs.SkipDir
		}
		imports := importsOf(t, path)
		if imports == nil {
			return nil
		}
		checked++
		pkg := filepath.ToSlash(path)
		for _, bad := range []string{"util", "utils", "common", "types", "helpers", "base"} {
			if filepath.Base(pkg) == bad {
				t.Errorf("%s: a package is named by what it gives, not %q", pkg, bad)
			}
		}
		for _, imp := range imports {
			check(t, pkg, imp)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if checked < 10 {
		t.Fatalf("only %d packages found: the test looks in the wrong place", checked)
	}
}

func check(t *testing.T, pkg, imp string) {
	t.Helper()
	local, ours := strings.CutPrefix(imp, module)
	service := func(p string) string { // services/x of services/x/y
		parts := strings.SplitN(p, "/", 3)
		return strings.Join(parts[:min(2, len(parts))], "/")
	}
	if ours && under(pkg, "services") && under(local, "services") && service(pkg) != service(local) && service(pkg) != "services/trireme" {
		t.Errorf("%s imports %s: a service imports no other service", pkg, imp)
	}
	for _, r := range rules {
		if !under(pkg, r.path) || (ours && under(local, pkg)) {
			continue
		}
		skip := false
		for _, e := range r.except {
			skip = skip || under(pkg, e)
		}
		for _, f := range r.forbid {
			name := imp
			if ours {
				name = local
			}
			if !skip && (name == f || strings.HasPrefix(name, strings.TrimSuffix(f, "/")+"/")) && !allowed(pkg, name, f) {
				t.Errorf("%s imports %s: %s", pkg, imp, r.because)
			}
		}
	}
}

// allowed: siblings below the same folder of shared may see each other (kernel/cpu sees kernel/check).
func allowed(pkg, name, forbidden string) bool {
	return strings.HasSuffix(forbidden, "/") && (name == strings.TrimSuffix(forbidden, "/") ||
		(under(pkg, strings.TrimSuffix(forbidden, "/")) && pkg != "shared/model"))
}

func under(pkg, path string) bool { return pkg == path || strings.HasPrefix(pkg, path+"/") }

// importsOf returns what the non-test files of a folder import, for any operating system and processor; nil when there
// are none.
func importsOf(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var imports []string
	for _, e := range entries {
		name := e.Name()
		if e.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), filepath.Join(dir, name), nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		imports = append(imports, "")
		for _, spec := range f.Imports {
			p, err := strconv.Unquote(spec.Path.Value)
			if err != nil || build.IsLocalImport(p) {
				t.Fatalf("%s imports %s", name, spec.Path.Value)
			}
			imports = append(imports, p)
		}
	}
	return imports
}

// Decisions have no clock and no goroutines: what happens when is their caller's to say, a simulator's too.
func TestDecisionsHaveNoClock(t *testing.T) {
	clock := []string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "Tick", "NewTimer", "NewTicker"}
	files := 0
	for _, dir := range []string{"shared/sched", "shared/plan"} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			files++
			set := token.NewFileSet()
			f, err := parser.ParseFile(set, path, nil, 0)
			if err != nil {
				return err
			}
			ast.Inspect(f, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.GoStmt:
					t.Errorf("%v: starts a goroutine", set.Position(n.Pos()))
				case *ast.SelectorExpr:
					if x, ok := n.X.(*ast.Ident); ok && x.Name == "time" && slices.Contains(clock, n.Sel.Name) {
						t.Errorf("%v: time.%s looks at the clock", set.Position(n.Pos()), n.Sel.Name)
					}
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if files == 0 {
		t.Fatal("no file found: the test looks in the wrong place")
	}
}

// Files stay readable in one sitting.
func TestFilesStayShort(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name := d.Name(); path != "." && (strings.HasPrefix(name, ".") || name == "testdata") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		data, err := os.ReadFile(path)
		if n := strings.Count(string(data), "\n"); n > 600 {
			t.Errorf("%s has %d lines: split it", path, n)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
