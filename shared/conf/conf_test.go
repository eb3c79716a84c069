package conf_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
	"github.com/google/go-cmp/cmp"

	"trireme.dev/shared/conf"
)

func TestParseTopology(t *testing.T) {
	for s, want := range map[string]conf.Topology{
		"1E1P1D":         {Groups: []conf.Group{{1, "E", 1}, {1, "P", 1}, {1, "D", 1}}},
		"5E2P1D":         {Groups: []conf.Group{{5, "E", 1}, {2, "P", 1}, {1, "D", 1}}},
		"1Dx4":           {Groups: []conf.Group{{1, "D", 4}}},
		"4EPD":           {Groups: []conf.Group{{4, "EPD", 1}}},
		"1E, 2Px2, 1Dx3": {Groups: []conf.Group{{1, "E", 1}, {2, "P", 2}, {1, "D", 3}}},
		"1E1P1D,2Dx0+1":  {Groups: []conf.Group{{1, "E", 1}, {1, "P", 1}, {1, "D", 1}, {2, "D", 0}}, Spare: 1},
		"1Dx0,1E":        {Groups: []conf.Group{{1, "D", 0}, {1, "E", 1}}},
		"2E,1PDx2+3":     {Groups: []conf.Group{{2, "E", 1}, {1, "PD", 2}}, Spare: 3},
	} {
		got, err := conf.ParseTopology(s)
		if err != nil || !cmp.Equal(got, want) {
			t.Errorf("%s: %+v, %v; want %+v", s, got, err, want)
		}
		if again, err := conf.ParseTopology(got.String()); err != nil || !cmp.Equal(again, got) {
			t.Errorf("%s: written as %s and read as %+v, %v", s, got, again, err)
		}
	}
	for _, s := range []string{"", "E", "1X", "0E", "0Ex0", "1DE", "1EE", "+2", "2000E", "1E-1P", "99999999999999999999E"} {
		if got, err := conf.ParseTopology(s); !errors.Is(err, conf.ErrTopology) {
			t.Errorf("%q: %+v, %v", s, got, err)
		}
	}
	if n := (conf.Topology{Groups: []conf.Group{{2, "EP", 3}, {1, "P", 1}, {4, "P", 0}}, Spare: 2}); n.NPUs() != 9 || n.Instances('P') != 3 {
		t.Errorf("%v has %d NPUs and %d prefill instances", n, n.NPUs(), n.Instances('P'))
	}
}

func TestTopologyWithoutARole(t *testing.T) {
	for before, want := range map[string]string{"1E1P1D": "1P1D", "2E2EPD1Px3+1": "2PD1Px3+1", "1P1D": "1P1D", "3ED": "3D"} {
		top, err := conf.ParseTopology(before)
		if err != nil {
			t.Fatal(err)
		}
		if got := top.Without('E').String(); got != want {
			t.Errorf("%s without encoders is %s, want %s", before, got, want)
		}
		if top.String() != before {
			t.Errorf("%s has become %s", before, top)
		}
	}
}

func FuzzParseTopology(f *testing.F) {
	f.Add("5E2P1D+2")
	f.Fuzz(func(t *testing.T, s string) {
		top, err := conf.ParseTopology(s)
		if err != nil {
			return
		}
		if again, err := conf.ParseTopology(top.String()); err != nil || !cmp.Equal(again, top) {
			t.Errorf("%q is %+v, written %s, read %+v, %v", s, top, top, again, err)
		}
	})
}

func TestBytes(t *testing.T) {
	for s, want := range map[string]conf.Bytes{
		"0": 0, "1048576": 1 << 20, "4GiB": 4 << 30, "4g": 4 << 30, "512 MiB": 512 << 20, "1.5K": 1536, "2TB": 2 << 40,
	} {
		var b conf.Bytes
		if err := b.UnmarshalText([]byte(s)); err != nil || b != want {
			t.Errorf("%s: %d, %v; want %d", s, b, err, want)
		}
	}
	for _, s := range []string{"", "x", "-1", "4XB", "1e300G", "NaN"} {
		var b conf.Bytes
		if err := b.UnmarshalText([]byte(s)); err == nil {
			t.Errorf("%q is read as %d", s, b)
		}
	}
	if s := conf.Bytes(3 << 29).String(); s != "1.5 GiB" {
		t.Errorf("1.5 GiB is written %s", s)
	}
}

// cli is a small program of the shape of ours.
type cli struct {
	Config   kong.ConfigFlag
	LogLevel string `default:"info"`
	Up       struct {
		HTTP  string   `name:"http" default:"127.0.0.1:8080" env:"TEST_HTTP"`
		Allow []string `name:"allow"`
		N     int      `default:"3"`
	} `cmd:""`
}

func parse(t *testing.T, file string, args ...string) (cli, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	var c cli
	k, err := kong.New(&c, kong.Configuration(conf.YAML), kong.Exit(func(int) { t.Error("exit") }))
	if err != nil {
		t.Fatal(err)
	}
	_, err = k.Parse(append([]string{"--config", path, "up"}, args...))
	return c, err
}

func TestFileStandsUnderEnvironmentAndFlags(t *testing.T) {
	const file = "log-level: debug\nup:\n  http: file:1\n  allow: [a, b]\n  n: 7\n"
	c, err := parse(t, file)
	if err != nil || c.LogLevel != "debug" || c.Up.HTTP != "file:1" || !cmp.Equal(c.Up.Allow, []string{"a", "b"}) || c.Up.N != 7 {
		t.Errorf("file alone: %+v, %v", c, err)
	}
	t.Setenv("TEST_HTTP", "env:1")
	if c, err = parse(t, file); err != nil || c.Up.HTTP != "env:1" {
		t.Errorf("with environment: %+v, %v", c, err)
	}
	if c, err = parse(t, file, "--http", "flag:1"); err != nil || c.Up.HTTP != "flag:1" {
		t.Errorf("with flag: %+v, %v", c, err)
	}
	if c, err = parse(t, ""); err != nil || c.Up.N != 3 {
		t.Errorf("empty file: %+v, %v", c, err)
	}
}

// What a file says of a flag of text is that, also where YAML would see a number, and a command under which all is a comment has no flags.
func TestFileIsTakenAsWritten(t *testing.T) {
	for _, text := range []string{"0123", "1.10", "0x1F", "1e3", "true", "no", "2026-11-27", "12345678901234567890123"} {
		c, err := parse(t, "up:\n  http: "+text+"\n  allow: ["+text+", b]\n")
		if err != nil || c.Up.HTTP != text || !cmp.Equal(c.Up.Allow, []string{text, "b"}) {
			t.Errorf("%s: %+v, %v", text, c.Up, err)
		}
	}
	if c, err := parse(t, "x: &x {n: 7}\nup: {<<: *x, http: &a 07, allow: [*a]}\n"); err == nil || !strings.Contains(err.Error(), "no setting x") {
		t.Errorf("%+v, %v", c, err)
	}
	if c, err := parse(t, "up: {http: &a 07, allow: [*a]}\n"); err != nil || c.Up.HTTP != "07" || !cmp.Equal(c.Up.Allow, []string{"07"}) {
		t.Errorf("with an anchor: %+v, %v", c.Up, err)
	}
	if c, err := parse(t, "log-level: debug\nup:\n#  n: 4\n"); err != nil || c.Up.N != 3 {
		t.Errorf("a command without flags: %+v, %v", c, err)
	}
	if c, err := parse(t, "# nothing\n"); err != nil || c.Up.N != 3 {
		t.Errorf("only a comment: %+v, %v", c, err)
	}
}

func TestSettingOfAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.yaml")
	if err := os.WriteFile(path, []byte("log-level: debug\nencoder: {metrics: \":9101\"}\nscaler: {run: {metrics: \":9102\"}}\nhmm:\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for want, at := range map[string][]string{"debug": {"log-level"}, ":9101": {"encoder", "metrics"}, ":9102": {"scaler", "run", "metrics"}} {
		if got, err := conf.Setting(path, at...); err != nil || got != want {
			t.Errorf("%v is %q, %v", at, got, err)
		}
	}
	for _, at := range [][]string{{"hmm", "metrics"}, {"decoder", "metrics"}, {"log-level", "metrics"}, {"encoder", "metrics", "more"}} {
		if got, err := conf.Setting(path, at...); err != nil || got != "" {
			t.Errorf("%v is %q, %v", at, got, err)
		}
	}
	if got, err := conf.Setting("", "log-level"); err != nil || got != "" {
		t.Errorf("without a file: %q, %v", got, err)
	}
	if _, err := conf.Setting(path+"x", "log-level"); !errors.Is(err, conf.ErrFile) {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestFileFaultsNameTheKey(t *testing.T) {
	for file, say := range map[string]string{
		"up:\n  htttp: x\n":         "c.yaml: there is no setting up.htttp",
		"topology: 1E\n":            "c.yaml: there is no setting topology",
		"http: x\n":                 "c.yaml: there is no setting http here: it belongs under the name of its command, up",
		"up: 3\n":                   "c.yaml: up is a command",
		"up: [\n":                   "c.yaml: yaml",
		"up:\n  n: many\n":          "--n",
		"up:\n  http:\n":            "c.yaml: up.http has no value",
		"up:\n  http: ~\n":          "c.yaml: up.http has no value",
		"up:\n  allow: [a, null]\n": "c.yaml: up.allow has no value",
		"up: &x {n: *x}\n":          "contains itself",
	} {
		if _, err := parse(t, file); err == nil || !strings.Contains(err.Error(), say) {
			t.Errorf("%q: %v, want an error with %q", file, err, say)
		}
	}
}
