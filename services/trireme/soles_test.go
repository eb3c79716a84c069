package main

import (
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/wire"
)

// settings is a file of settings.
func settings(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "settings.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// Where the file of settings gives instances of a kind one address for metrics, there is one of the kind, or up says why not.
func TestOneAddressForMetrics(t *testing.T) {
	for _, x := range []struct{ file, topology, refused string }{
		{"encoder: {metrics: 127.0.0.1:9101}", "2E1P1D", "2 instances of encoder cannot all serve metrics at 127.0.0.1:9101, as the file of settings says: write 127.0.0.1:0"},
		{"encoder: {metrics: 127.0.0.1:9101}", "1E2P2D", ""},
		{"encoder: {metrics: 127.0.0.1:0}\ndecoder: {metrics: \":9103\"}", "2E1P1D", ""},
		{"decoder: {metrics: \":9103\"}", "1E1P1D,1Dx0", "2 instances of decoder cannot all serve metrics at :9103, as the file of settings says: write :0"},
		{"stage: {metrics: \"[::1]:9103\"}", "1EP1PD1D", "2 instances of stage cannot all serve metrics at [::1]:9103, as the file of settings says: write [::1]:0"},
		{"stage: {metrics: \":9103\"}", "1EPD2D", ""},
		{"encoder:\n", "2E1P1D", ""},
		{"encoder: {metrics: \":9101\"}\ndecoder: {metrics: \":9101\"}", "1E1P1D", "encoder and decoder cannot both serve metrics at :9101, as the file of settings says: give each another port"},
		{"encoder: {metrics: \":9101\"}\nstage: {metrics: \":9101\"}", "1E1P1D", ""},
		{"stage: {metrics: \":9101\"}\nhmm: {metrics: \":9101\"}", "1EPD", "stage and hmm cannot both serve metrics at :9101"},
		{"hmm: {metrics: \":9101\"}\nscaler: {run: {metrics: \":9101\"}}", "1EPD", ""}, // there is no scaler
		{"encoder: {metrics: \":0\"}\ndecoder: {metrics: \":0\"}\nhmm: {metrics: \":0\"}", "2E1P2D", ""},
		{"up: {topology: 9EPD}", "2E1P1D", ""},
	} {
		s, err := readSoles(settings(t, x.file))
		if err != nil {
			t.Fatal(err)
		}
		parsed, err := conf.ParseTopology(x.topology)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.checkTopology(parsed, "hmm"); x.refused == "" && err != nil || x.refused != "" && (err == nil || !strings.Contains(err.Error(), x.refused)) {
			t.Errorf("%s, %s: %v, want %q", x.file, x.topology, err, x.refused)
		}
	}
	if s, err := readSoles(""); err != nil || len(s) > 0 {
		t.Errorf("without a file: %v, %v", s, err)
	}
	file := settings(t, "decoder: {metrics: \":9103\"}\n")
	if text, status := said("up", "--config", file, "--data", t.TempDir(), "--topology", "1E1P2D"); status != exitUsage || !strings.Contains(text, "write :0 there") {
		t.Errorf("up: status %d, %s", status, text)
	}
}

// An address that is none is refused at once, as it would be as wrong when whoever has it is started again.
func TestAddressesThatAreNone(t *testing.T) {
	for _, x := range []struct{ args, says string }{
		{"encoder --metrics 9101", "--metrics 9101 is no address like 127.0.0.1:9101"},
		{"stage --roles EPD --metrics 127.0.0.1:99999", "--metrics 127.0.0.1:99999 is no address"},
		{"hmm --metrics :x", "--metrics :x is no address"},
		{"hmm --peer-listen 7400", "--peer-listen 7400 is no address"},
		{"gateway --http localhost", "--http localhost is no address"},
		{"gateway --admin 8081", "--admin 8081 is no address"},
		{"scaler run --metrics 9101", "--metrics 9101 is no address"},
	} {
		args := append(strings.Fields(x.args), "--nats-url", "nats://127.0.0.1:1")
		if text, status := said(args...); status != exitUsage || !strings.Contains(text, x.says) {
			t.Errorf("%s: status %d, %s", x.args, status, text)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	taken := l.Addr().String()
	if text, status := said("up", "--data", t.TempDir(), "--http", "127.0.0.1:0", "--peer-listen", taken); status != exitUsage || !strings.Contains(text, "port of --peer-listen "+taken+" is in use") {
		t.Errorf("up where another one serves other nodes: status %d, %s", status, text)
	}
}

// Nor does up start a second one when it is asked to while it runs.
func TestOneAddressForMetricsOfReplicas(t *testing.T) {
	r := sleepers(t, "1E1P1D")
	r.sole = soles{"decoder": ":9103"}
	granted := func() (grants, error) {
		return grants{spare: []int{0, 1, 2, 3, 4}, named: map[string]bool{"decoder-0": true, "encoder-0": true, "prefill-0": true}}, nil
	}
	for _, ask := range []wire.Replicas{{Roles: "D", Count: 2}, {Roles: "D", Start: 1}, {Roles: "D", Start: 1, NPUs: 2}, {Roles: "D", Count: 2, Check: true}} {
		if report := r.set(ask, granted); !strings.Contains(report.Why, "2 instances of decoder cannot all serve metrics at :9103") {
			t.Errorf("%+v: %+v", ask, report)
		}
	}
	if report := r.set(wire.Replicas{Roles: "E", Count: 2}, granted); report.Why != "" || len(report.Started) != 1 {
		t.Errorf("another kind: %+v", report)
	}
	if report := r.set(wire.Replicas{Roles: "D", Count: 1}, granted); report.Why != "" {
		t.Errorf("as many as there are: %+v", report)
	}
}

// What up has checked of the HMM's settings is what the HMM reads from its command line, whichever flags they have in common.
func TestHMMReadsWhatUpHasChecked(t *testing.T) {
	c := commandLine(t, "up", "--topology", "1E1P1D+2", "--node", "a", "--peer-listen", ":7400", "--npu-memory", "1GiB", "--host-memory", "65537KiB").Up
	p, err := c.plan()
	if err != nil {
		t.Fatal(err)
	}
	fill := func(v reflect.Value) { // every flag that up and the HMM share
		for i := range v.NumField() {
			switch f := v.Field(i); f.Interface().(type) {
			case string:
				f.SetString("per-npu")
			case conf.Bytes:
				f.SetInt(int64(i+3) << 20)
			case *conf.Bytes:
				f.Set(reflect.ValueOf(new(conf.Bytes(i))))
			default:
				t.Fatalf("what is said of a flag of the type %s?", f.Type())
			}
		}
	}
	for _, shared := range []any{&c.domainFlags, &c.weightsFlags, &c.readyFlag, &c.cacheFlags} {
		fill(reflect.ValueOf(shared).Elem())
	}
	h := c.hmm(p)
	read := commandLine(t, append([]string{"hmm"}, h.args()...)...).Hmm
	want := h.config()
	want.Reserve = read.Reserve // up has no flag for it
	if diff := cmp.Diff(want, read.config()); diff != "" || read.PeerListen != ":7400" || want.KVCache == 0 || want.MMCache == 0 || want.NPUs != 5 {
		t.Errorf("%+v: %s", want, diff)
	}
}
