package main

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// said is what a command line says, and its exit status.
func said(args ...string) (string, int) {
	var out bytes.Buffer
	status := run(args, strings.NewReader(""), &out, &out)
	return out.String(), status
}

// A command is the same whether the parser knows all others, as with a file of settings, or it alone.
func TestCommandsStandAlone(t *testing.T) {
	file := filepath.Join(t.TempDir(), "settings.yaml")
	if err := os.WriteFile(file, []byte("log-level: warn\nup: {topology: 1EPD}\nbench: {memory: {}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	commands := 0
	for f := range reflect.TypeFor[cli]().Fields() {
		if _, command := f.Tag.Lookup("cmd"); !command {
			continue
		}
		commands++
		name := strings.ToLower(f.Name)
		for _, more := range []string{"--help", "--no-such-flag"} {
			alone, a := said(name, more)
			among, b := said(name, more, "--config", file)
			if alone != among || a != b {
				t.Errorf("%s %s: status %d,\n%s\namong all commands: status %d,\n%s", name, more, a, alone, b, among)
			}
			if !strings.Contains(alone, map[string]string{"--help": "Usage: trireme " + name, "--no-such-flag": "unknown flag --no-such-flag"}[more]) {
				t.Errorf("%s %s:\n%s", name, more, alone)
			}
		}
		if n := len(unneeded([]string{name}, "")); n == 0 {
			t.Errorf("for %s all commands are described", name)
		}
	}
	if commands < 10 {
		t.Errorf("%d commands", commands)
	}
	if n := len(unneeded([]string{"version"}, "")); n != commands-1 {
		t.Errorf("%d of %d commands are not needed for one of them", n, commands)
	}
	for _, args := range [][]string{{}, {"--help"}, {"--log-level", "up"}, {"versoin"}, {"version", "--config", file}, {"version", "--config=" + file}} {
		if some := unneeded(args, ""); some != nil {
			t.Errorf("%q: not needed: %v", args, some)
		}
	}
	if some := unneeded([]string{"version"}, file); some != nil {
		t.Errorf("with settings of a file that the environment names, not needed: %v", some)
	}
	if text, status := said("versoin"); status != exitUsage || !strings.Contains(text, `"version"`) {
		t.Errorf("a misspelt command: status %d, %s", status, text)
	}
}

// A command line that cannot be read is one line that says where more is said; none at all is answered with the help.
func TestCommandLineThatCannotBeRead(t *testing.T) {
	for args, want := range map[string]string{
		"model verify x":               "trireme: missing flags: --golden=DIR (trireme model verify --help tells more)\n",
		"model":                        "trireme: expected one of \"verify\", \"tokenize\" (trireme model --help tells more)\n",
		"scale":                        "trireme: expected \"<instance>\" (trireme scale --help tells more)\n",
		"nonsense":                     "trireme: unexpected argument nonsense (trireme --help tells more)\n",
		"status --jsn":                 "trireme: unknown flag --jsn, did you mean \"--json\"? (trireme status --help tells more)\n",
		"up --npu-memory much":         "trireme: --npu-memory: \"much\" is no size: write 512MiB or 4GiB (trireme up --help tells more)\n",
		"scale decoder two --dry-run":  "trireme: [<npus>]: \"two\" is no number of NPUs: write 4, +1 or -2 (trireme scale --help tells more)\n",
		"version --config /not/a/file": "trireme: open /not/a/file: no such file or directory (trireme version --help tells more)\n",
	} {
		if text, status := said(strings.Fields(args)...); status != exitUsage || text != want {
			t.Errorf("%s: status %d, %q; want %q", args, status, text, want)
		}
	}
	empty := t.TempDir()
	want := "trireme up: --model " + empty + ": it has no config.json, so it is not the folder of a Hugging Face model\n"
	if text, status := said("up", "--model", empty, "--data", t.TempDir(), "--http", "127.0.0.1:0", "--nats", "127.0.0.1:0", "--monitor", "127.0.0.1:0"); status != exitUsage || text != want {
		t.Errorf("a folder without a model: status %d, %q; want %q", status, text, want)
	}
	help, _ := said("--help")
	if text, status := said(); status != exitUsage || text != help {
		t.Errorf("no command: status %d, %q", status, text)
	}
}

// Services refuse limits of which nothing could be in work, with the name of the flag.
func TestServicesRefuseLimits(t *testing.T) {
	for args, want := range map[string]string{
		"prefill --rows=-1":                "--rows -1",
		"prefill --slots=0":                "--slots 0",
		"decoder --slots=0":                "--slots 0",
		"stage --roles PD --sequences=0":   "--sequences 0",
		"stage --roles PD --step-tokens=0": "--step-tokens 0",
		"gateway --max-open=-1":            "max-open is -1",
		"gateway --queue-wait=-1s":         "queue-wait is -1s",
	} {
		if text, status := said(strings.Fields(args + " --nats-url nats://127.0.0.1:1")...); status != exitUsage || !strings.Contains(text, want) {
			t.Errorf("%s: status %d, %s; want %s", args, status, text, want)
		}
	}
}
