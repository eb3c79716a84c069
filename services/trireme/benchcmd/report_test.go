package benchcmd

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/hbm/hbmbench"
)

func TestReport(t *testing.T) {
	r := newReport()
	add := func(name, against string, c hbmbench.Case, s ...time.Duration) {
		t.Helper()
		if err := r.add(row{name: name, against: against}, c, s); err != nil {
			t.Fatal(err)
		}
	}
	us := time.Microsecond
	add("call", "", hbmbench.Case{Calls: 1}, 10*us, 20*us, 30*us)
	add("calls", "call", hbmbench.Case{Calls: 100}, 1000*us, 1000*us)
	add("memcpy", "", hbmbench.Case{Bytes: 1e6}, 100*us)
	add("map", "memcpy", hbmbench.Case{Bytes: 1e6, Extents: 10}, 5*us)
	if got := r.Rows[1]; got.Each != 10_000 || got.Ratio != 0.5 {
		t.Errorf("100 calls in 1 ms: %+v", got)
	}
	if got := r.Rows[2]; got.Rate != 1e10 || got.Ratio != 0 {
		t.Errorf("1 MB in 100 us: %+v", got)
	}
	if got := r.Rows[3]; got.Rate != 0 || got.Each != 500 || got.Ratio != 0.05 {
		t.Errorf("10 extents in 5 us beside 100 us: %+v", got)
	}
	if err := r.add(row{name: "x", against: "nothing"}, hbmbench.Case{}, hbmbench.Samples{1}); err == nil {
		t.Error("a row is compared with one that is not there")
	}
	r.LeftOut = []string{"1 GiB: no room"}
	var b bytes.Buffer
	if err := r.writeTable(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"0.5 x call", "0.05 x memcpy", "10.00", "left out: 1 GiB"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, b.String())
		}
	}
}

func TestShort(t *testing.T) {
	for ns, want := range map[float64]string{1: "1 ns", 1234: "1.23 us", 1.5e6: "1.5 ms", 2e9: "2 s", 999.6: "1000 ns"} {
		if got := short(ns); got != want {
			t.Errorf("short(%v) = %q, want %q", ns, got, want)
		}
	}
}

func TestSizes(t *testing.T) {
	for largest, want := range map[int64][]int64{
		1 << 20: {1 << 20}, 2<<20 + 1: {1 << 20, 2 << 20}, 1 << 30: {1 << 20, 16 << 20, 256 << 20, 1 << 30}, hbmbench.Page: {hbmbench.Page},
	} {
		c := Memory{}
		c.Largest = conf.Bytes(largest)
		got := c.sizes()
		if len(got) != len(want) {
			t.Fatalf("sizes up to %d: %v, want %v", largest, got, want)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Errorf("sizes up to %d: %v, want %v", largest, got, want)
			}
		}
	}
}

func TestFlags(t *testing.T) {
	for _, c := range []Memory{{Largest: 1}, {Largest: 1 << 41}, {Largest: 1 << 20, Time: -1}} {
		if err := c.Run(Env{Context: t.Context()}); !errors.Is(err, ErrUsage) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
