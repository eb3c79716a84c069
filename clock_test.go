package trireme_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// wallClock is every file that makes something of the wall clock that leaves time.Time, and with it Go's monotonic clock, and why
// it does no harm when a clock is set forwards or backwards on one machine. What a time.Time is compared with in one process is
// the monotonic clock's; between processes there are only durations (wire.Request.Left, for one).
var wallClock = map[string]string{
	"services/gateway/collected.go":                "created, shown to clients",
	"services/gateway/gateway.go":                  "created, shown to clients",
	"services/gateway/stream.go":                   "created, shown to clients",
	"services/hmm/daemon.go":                       "first generation: those of two HMMs are never compared (services/gateway/request), handles of an older one have another key",
	"services/trireme/benchcmd/controlload.go":     "a benchmark: all of its processes are on one machine",
	"services/trireme/benchcmd/irp.go":             "a benchmark: all of its processes are on one machine",
	"services/trireme/benchcmd/streams.go":         "a benchmark: all of its processes are on one machine",
	"services/trireme/standin/decode.go":           "a benchmark: all of its processes are on one machine",
	"services/trireme/standin/standin.go":          "a benchmark: all of its processes are on one machine",
	"shared/bus/dead.go":                           "order in which dead letters are listed",
	"shared/bus/events.go":                         "when an event was stored, by the clock of NATS, shown to operators",
	"shared/bus/queues.go":                         "age of the oldest message: both times are by the clock of NATS",
	"shared/hbm/client.go":                         "a deadline that is long past",
	"shared/transfer/transfertest/transfertest.go": "serial numbers of certificates of tests",
}

// Nothing but what is listed reads a wall clock in a way that another process, or the same one later, could compare. It shows
// that there is no such code, not how a machine behaves whose clock jumps: only the kernel's whole wall clock can be set, not that
// of one process.
func TestNobodyComparesWallClocks(t *testing.T) {
	used := map[string]bool{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		set := token.NewFileSet()
		file, err := parser.ParseFile(set, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			what := ""
			switch n := n.(type) {
			case *ast.CallExpr: // t.UnixNano(), t.Round(0), time.Unix(1, 0)
				if s, ok := n.Fun.(*ast.SelectorExpr); ok {
					pkg, _ := s.X.(*ast.Ident)
					ofTime := pkg != nil && pkg.Name == "time"
					switch {
					case slices.Contains([]string{"Unix", "UnixMilli", "UnixMicro", "UnixNano"}, s.Sel.Name) && (len(n.Args) == 0 || ofTime),
						slices.Contains([]string{"MarshalBinary", "ModTime", "AppendFormat"}, s.Sel.Name) && len(n.Args) < 2,
						ofTime && (s.Sel.Name == "Parse" || s.Sel.Name == "Date"):
						what = s.Sel.Name
					case s.Sel.Name == "Round" && len(n.Args) == 1:
						if lit, ok := n.Args[0].(*ast.BasicLit); ok && lit.Value == "0" {
							what = "Round(0)"
						}
					}
				}
			case *ast.SelectorExpr: // of a message or a stream in JetStream
				if n.Sel.Name == "Timestamp" || n.Sel.Name == "TimeStamp" || n.Sel.Name == "FirstTime" || n.Sel.Name == "LastTime" {
					what = n.Sel.Name
				}
			}
			if what == "" {
				return true
			}
			used[path] = true
			if wallClock[path] == "" {
				t.Errorf("%s: %s is of a wall clock: between processes use durations, or say in clock_test.go why it does no harm", set.Position(n.Pos()), what)
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for path := range wallClock {
		if !used[path] {
			t.Errorf("%s reads no wall clock any more", path)
		}
	}
}
