package hbmbench_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"trireme.dev/shared/hbm/hbmbench"
	"trireme.dev/shared/mem/memtest"
)

func TestMeasure(t *testing.T) {
	done, closed := 0, 0
	c := hbmbench.Case{
		Do:    func() (time.Duration, error) { done++; return time.Duration(100 - done), nil },
		Close: func() error { closed++; return nil },
	}
	s, err := hbmbench.Measure(t.Context(), c, 0)
	if err != nil || len(s) != 3 || done != 4 || closed != 1 {
		t.Fatalf("%v, %v: done %d times, closed %d times", s, err, done, closed)
	}
	if s[0] != 96 || s.Quantile(0) != 96 || s.Quantile(0.5) != 97 || s.Quantile(1) != 98 {
		t.Errorf("samples %v", s)
	}
	if hbmbench.Samples(nil).Quantile(0.5) != 0 {
		t.Error("the median of nothing")
	}
	broken := errors.New("broken")
	c.Do = func() (time.Duration, error) { return 0, broken }
	if _, err := hbmbench.Measure(t.Context(), c, time.Hour); !errors.Is(err, broken) || closed != 2 {
		t.Errorf("%v, closed %d times", err, closed)
	}
	ctx, cancel := context.WithCancel(t.Context())
	c.Do = func() (time.Duration, error) { cancel(); return 0, nil }
	if _, err := hbmbench.Measure(ctx, c, time.Hour); !errors.Is(err, context.Canceled) || closed != 3 {
		t.Errorf("%v, closed %d times", err, closed)
	}
}

// TestCases does every case that needs no HMM, and checks that none leaves anything behind.
func TestCases(t *testing.T) {
	memtest.NoLeaks(t)
	for name, open := range map[string]func() (hbmbench.Case, error){
		"map":    func() (hbmbench.Case, error) { return hbmbench.Map(3) },
		"remap":  func() (hbmbench.Case, error) { return hbmbench.Remap(3) },
		"fresh":  func() (hbmbench.Case, error) { return hbmbench.Back(4*hbmbench.Page, hbmbench.Fresh) },
		"reused": func() (hbmbench.Case, error) { return hbmbench.Back(4*hbmbench.Page, hbmbench.Reused) },
		"ready":  func() (hbmbench.Case, error) { return hbmbench.Back(4*hbmbench.Page, hbmbench.Readied) },
		"memcpy": func() (hbmbench.Case, error) { return hbmbench.Memcpy(10_000) },
		"sum":    func() (hbmbench.Case, error) { return hbmbench.Checksum(make([]byte, 10)), nil },
	} {
		c, err := open()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if s, err := hbmbench.Measure(t.Context(), c, 0); err != nil || len(s) != 3 {
			t.Errorf("%s: %v, %v", name, s, err)
		}
	}
}

func TestCopyAndFill(t *testing.T) {
	from, to := make([]byte, 9_999), make([]byte, 9_999)
	hbmbench.Fill(from)
	if _, err := hbmbench.Copy(to, from).Do(); err != nil {
		t.Fatal(err)
	}
	for i := range to {
		if to[i] != byte(i%4096) {
			t.Fatalf("byte %d is %d", i, to[i])
		}
	}
}

func TestPing(t *testing.T) {
	a, b := net.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- hbmbench.Echo(b) }()
	if s, err := hbmbench.Measure(t.Context(), hbmbench.Ping(a), 0); err != nil || s[0] <= 0 {
		t.Errorf("%v, %v", s, err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
