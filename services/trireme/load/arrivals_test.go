package load

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"gonum.org/v1/gonum/stat"
)

func parse(t *testing.T, text string, rate float64) Arrivals {
	t.Helper()
	a, err := ParseArrivals(text, rate)
	if err != nil {
		t.Fatal(err)
	}
	if a.String() != text {
		t.Errorf("%q is shown as %q", text, a)
	}
	return a
}

func offsets(t *testing.T, a Arrivals, seed uint64, n int) []time.Duration {
	t.Helper()
	out, err := a.offsets(seed, n)
	if err != nil || len(out) != n || out[0] != 0 || !slices.IsSorted(out) {
		t.Fatalf("%v: %d offsets, the first %v, rising %v, %v", a, len(out), out[0], slices.IsSorted(out), err)
	}
	return out
}

func TestRandomArrivals(t *testing.T) {
	const n, rate = 50000, 20.0
	for text, shape := range map[string]float64{"poisson": 1, "gamma:0.25": 0.25, "gamma:4": 4} {
		a := parse(t, text, rate)
		out := offsets(t, a, 7, n)
		gaps := make([]float64, n-1)
		for i := range gaps {
			gaps[i] = (out[i+1] - out[i]).Seconds()
		}
		// A gamma distribution of mean 1/rate and this shape has variance mean^2/shape.
		mean, variance := stat.MeanVariance(gaps, nil)
		deviation := 1 / rate / math.Sqrt(shape*n)
		if math.Abs(mean-1/rate) > 5*deviation {
			t.Errorf("%s: gaps of %g s on average, want %g within %g", text, mean, 1/rate, 5*deviation)
		}
		if want := 1 / rate / rate / shape; variance < 0.9*want || variance > 1.1*want {
			t.Errorf("%s: variance %g, want %g", text, variance, want)
		}
		if !slices.Equal(out, offsets(t, a, 7, n)) || slices.Equal(out, offsets(t, a, 8, n)) {
			t.Errorf("%s: the seed, and only the seed, must decide", text)
		}
	}
}

func TestEvenArrivals(t *testing.T) {
	for text, want := range map[string][]time.Duration{
		"constant": {0, 100 * time.Millisecond, 200 * time.Millisecond, 300 * time.Millisecond, 400 * time.Millisecond},
		"bursts:2": {0, 0, 200 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond},
	} {
		if got := offsets(t, parse(t, text, 10), 0, 5); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}

func TestSchedule(t *testing.T) {
	path := filepath.Join(t.TempDir(), "times")
	if err := os.WriteFile(path, []byte("# seconds, who\n3.5,b\n1, a\n\n2\tc\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	a := parse(t, "file:"+path, 0)
	if want := []time.Duration{0, time.Second, 2500 * time.Millisecond}; !slices.Equal(offsets(t, a, 0, 3), want) {
		t.Errorf("%v, want %v", offsets(t, a, 0, 3), want)
	}
	if Len(a) != 3 || a.Rate() != 0.8 {
		t.Errorf("%d times, %g a second", Len(a), a.Rate())
	}
	if _, err := a.offsets(0, 4); !errors.Is(err, ErrArrivals) {
		t.Errorf("four requests of three times: %v", err)
	}
}

func TestBadArrivals(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"empty": "# nothing\n", "words": "1\nsoon\n", "past": "-1\n", "nan": "NaN\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, text := range []string{
		"", "poison", "poisson:2", "gamma", "gamma:0", "gamma:-1", "gamma:x", "bursts:0", "bursts", "constant:1", "file:",
		"file:" + dir + "/empty", "file:" + dir + "/words", "file:" + dir + "/past", "file:" + dir + "/nan",
	} {
		if _, err := ParseArrivals(text, 1); !errors.Is(err, ErrArrivals) {
			t.Errorf("%q: %v", text, err)
		}
	}
	for _, rate := range []float64{0, -1, math.NaN(), math.Inf(1)} {
		if _, err := ParseArrivals("poisson", rate); !errors.Is(err, ErrArrivals) {
			t.Errorf("rate %g: %v", rate, err)
		}
	}
	if _, err := ParseArrivals("file:"+dir+"/missing", 1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}
