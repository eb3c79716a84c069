package hmm_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/engine"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hf"
	"trireme.dev/shared/hf/hftest"
	"trireme.dev/shared/kernel/cpu"
	"trireme.dev/shared/model"

	"trireme.dev/services/hmm"
)

// Benchmarks of weights are small by default. In full:
//
//	HMM_BENCH_WEIGHTS=4GiB go test ./services/hmm -run '^$' -bench Weights -benchtime 5x
const weightsEnv = "HMM_BENCH_WEIGHTS"

// benchBytes is the size of the synthetic models.
func benchBytes(b *testing.B) int64 {
	b.Helper()
	text := os.Getenv(weightsEnv)
	if text == "" {
		return 48 << 20
	}
	var n conf.Bytes
	if err := n.UnmarshalText([]byte(text)); err != nil {
		b.Fatal(err)
	}
	return int64(n)
}

// weightsDaemon runs an HMM with room for twice the bytes.
func weightsDaemon(b *testing.B, bytes int64) (*hmm.Daemon, string) {
	return daemon(b, func(c *hmm.Config) {
		c.Weights = 2*bytes + 64<<20
		c.Weights -= c.Weights % page
	})
}

// shelve keeps hf's weights in a client's HMM.
type shelve struct {
	c    *hbm.Client
	sets []*hbm.Weights
}

func (s *shelve) Weights(ctx context.Context, set hf.Set, fill hf.Filler) ([][]byte, error) {
	w, err := s.c.OpenWeights(ctx, 0, hbm.WeightSet{Key: set.Key, Numbers: set.Numbers, Sizes: set.Sizes}, hbm.Filler(fill), nil)
	if err != nil {
		return nil, err
	}
	s.sets = append(s.sets, w)
	return w.Objects, nil
}

// BenchmarkAttachWeights opens a set that is there: calls and maps, then page tables, by number of extents at equal bytes and
// by bytes at an equal number of extents. Attaching should follow the extents, populating the bytes.
func BenchmarkAttachWeights(b *testing.B) {
	bytes := benchBytes(b)
	type size struct {
		extents int
		bytes   int64
	}
	sizes := []size{{12, bytes}, {96, bytes}, {768, bytes}}
	if bytes >= 6144*page {
		sizes = append(sizes, size{6144, bytes})
	}
	sizes = append(sizes, size{96, bytes / 8}, size{96, bytes / 2})
	for _, s := range sizes {
		b.Run(fmt.Sprintf("extents=%d/MiB=%d", s.extents, s.bytes>>20), func(b *testing.B) {
			_, socket := weightsDaemon(b, s.bytes)
			set := hbm.WeightSet{Key: hbm.Key{1}}
			for range s.extents {
				set.Sizes = append(set.Sizes, s.bytes/int64(s.extents))
			}
			maker := dial(b, socket, hbm.Hello{Instance: "maker"})
			if _, err := maker.OpenWeights(b.Context(), 0, set, func(context.Context, []int, [][]byte) error { return nil }, nil); err != nil {
				b.Fatal(err)
			}
			c := dial(b, socket, hbm.Hello{Instance: "user"})
			var populating time.Duration
			for b.Loop() {
				w, err := c.OpenWeights(b.Context(), 0, set, never, nil)
				if err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				began := time.Now()
				if err := w.Populate(b.Context()); err != nil {
					b.Fatal(err)
				}
				populating += time.Since(began)
				if err := w.Close(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			n := float64(b.N)
			b.ReportMetric(float64(b.Elapsed().Microseconds())/n/1e3, "attach-ms")
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/n/float64(s.extents), "attach-ns/extent")
			b.ReportMetric(float64(populating.Microseconds())/n/1e3, "populate-ms")
		})
	}
}

// synthetic writes a model of about so many bytes and returns its folder.
func synthetic(b *testing.B, bytes int64) string {
	b.Helper()
	s := hftest.Shape{Layers: 4, Experts: 32, Hidden: 512, ExpertHidden: 128, Vocab: 512} // 48 MiB
	for s.Bytes() < bytes && s.Experts < 128 {
		s.Experts *= 2
	}
	for s.Bytes() < bytes && s.Hidden < 2048 {
		s.Hidden *= 2
	}
	s.Layers = max(4, int(bytes/int64(s.Experts)/s.ExpertBytes()))
	dir := filepath.Join(b.TempDir(), "model")
	if err := hftest.Write(dir, s); err != nil {
		b.Fatal(err)
	}
	return dir
}

// evict drops the files of a folder from the page cache, as far as the system does that.
func evict(b *testing.B, dir string) {
	b.Helper()
	eachFile(b, dir, func(f *os.File) {
		if err := f.Sync(); err != nil {
			b.Fatal(err)
		}
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			b.Fatal(err)
		}
	})
}

func eachFile(b *testing.B, dir string, do func(*os.File)) {
	b.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.safetensors"))
	if err != nil || len(files) == 0 {
		b.Fatalf("no weights in %s: %v", dir, err)
	}
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			b.Fatal(err)
		}
		do(f)
		f.Close()
	}
}

// BenchmarkLoadWeights reads the experts of a folder into the HMM's memory, and the same files by dd, with the page cache warm
// and emptied before. fresh is memory that the HMM has not had before; used memory that it kept.
func BenchmarkLoadWeights(b *testing.B) {
	folders := map[string]string{"bundled": "../../models/shapes-vl-moe", "synthetic": synthetic(b, benchBytes(b))}
	for _, name := range []string{"bundled", "synthetic"} {
		dir := folders[name]
		for _, cold := range []bool{false, true} {
			cache := map[bool]string{false: "warm", true: "cold"}[cold]
			b.Run(name+"/cache="+cache, func(b *testing.B) {
				var loaded, dd, total, of int64
				var loading, copying time.Duration
				for b.Loop() {
					_, socket := weightsDaemon(b, 2*benchBytes(b))
					c := dial(b, socket, hbm.Hello{})
					f, err := hf.Open(dir)
					if err != nil {
						b.Fatal(err)
					}
					if cold {
						evict(b, dir)
					}
					m := &shelve{c: c}
					began := time.Now()
					if _, err := f.Load(b.Context(), m, hf.Text, nil); err != nil {
						b.Fatal(err)
					}
					loading += time.Since(began)
					loaded += m.sets[0].FilledBytes
					total, of = m.sets[0].Bytes, int64(len(m.sets[0].Objects))
					if err := f.Close(); err != nil {
						b.Fatal(err)
					}
					if err := c.Close(); err != nil {
						b.Fatal(err)
					}
					if cold {
						evict(b, dir)
					}
					n, took := byDD(b, dir)
					dd += n
					copying += took
				}
				b.ReportMetric(float64(loaded)/1e9/loading.Seconds(), "load-GB/s")
				b.ReportMetric(float64(dd)/1e9/copying.Seconds(), "dd-GB/s")
				b.ReportMetric(loading.Seconds()/float64(b.N), "load-s")
				b.ReportMetric(float64(total>>20), "MiB")
				b.ReportMetric(float64(of), "extents")
			})
		}
	}
}

// byDD reads the files of a folder one after the other with dd.
func byDD(b *testing.B, dir string) (bytes int64, took time.Duration) {
	b.Helper()
	eachFile(b, dir, func(f *os.File) {
		info, err := f.Stat()
		if err != nil {
			b.Fatal(err)
		}
		cmd := exec.Command("dd", "if="+f.Name(), "of=/dev/null", "bs=1M")
		cmd.Stderr = io.Discard
		began := time.Now()
		if err := cmd.Run(); err != nil {
			b.Fatal(err)
		}
		took += time.Since(began)
		bytes += info.Size()
	})
	return bytes, took
}

// BenchmarkFirstStep attaches the weights of a folder in a client that has never touched them and takes three decode steps,
// with the page tables filled before the first and without.
func BenchmarkFirstStep(b *testing.B) {
	folders := map[string]string{"bundled": "../../models/shapes-vl-moe", "synthetic": synthetic(b, benchBytes(b))}
	for _, name := range []string{"bundled", "synthetic"} {
		dir := folders[name]
		_, socket := weightsDaemon(b, 2*benchBytes(b))
		f, err := hf.Open(dir)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { f.Close() })
		maker := &shelve{c: dial(b, socket, hbm.Hello{Instance: "maker"})}
		if _, err := f.Load(b.Context(), maker, hf.Text, nil); err != nil {
			b.Fatal(err)
		}
		for _, populated := range []bool{true, false} {
			b.Run(fmt.Sprintf("%s/populated=%v", name, populated), func(b *testing.B) {
				var attach, populate time.Duration
				var steps [3]time.Duration
				var faults [3]int64
				for b.Loop() {
					m := &shelve{c: dial(b, socket, hbm.Hello{})}
					folder, err := hf.Open(dir)
					if err != nil {
						b.Fatal(err)
					}
					w, err := folder.Load(b.Context(), m, hf.Text, nil)
					if err != nil {
						b.Fatal(err)
					}
					attach += m.sets[0].Attaching
					began := time.Now()
					if populated {
						if err := folder.Populate(b.Context()); err != nil {
							b.Fatal(err)
						}
						if err := m.sets[0].Populate(b.Context()); err != nil {
							b.Fatal(err)
						}
					}
					populate += time.Since(began)
					threeSteps(b, folder.Config, w, &steps, &faults)
					if err := m.c.Close(); err != nil {
						b.Fatal(err)
					}
					if err := folder.Close(); err != nil {
						b.Fatal(err)
					}
				}
				n := float64(b.N)
				b.ReportMetric(float64(attach.Microseconds())/n/1e3, "attach-ms")
				b.ReportMetric(float64(populate.Microseconds())/n/1e3, "populate-ms")
				for i := range steps {
					b.ReportMetric(float64(steps[i].Microseconds())/n/1e3, fmt.Sprintf("step%d-ms", i+1))
					b.ReportMetric(float64(faults[i])/n, fmt.Sprintf("step%d-faults", i+1))
				}
			})
		}
	}
}

// threeSteps computes 64 tokens of eight sequences three times, which takes a token to almost every expert.
func threeSteps(b *testing.B, cfg model.Config, w *model.Weights, steps *[3]time.Duration, faults *[3]int64) {
	b.Helper()
	c, err := cpu.New(cpu.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	text, err := engine.NewText(cfg, []engine.NPU{{Compute: c, Weights: w}}, engine.Limits{Rows: 64, Seqs: 8})
	if err != nil {
		b.Fatal(err)
	}
	for i := range steps {
		var batch []engine.Seq
		for s := range 8 {
			block, err := c.Alloc(cfg.Text.BlockFloats())
			if err != nil {
				b.Fatal(err)
			}
			q := engine.Seq{Blocks: [][]float32{block}, Want: true}
			for t := range 8 {
				q.Tokens = append(q.Tokens, int32((s*61+t*7+1)%cfg.Text.Vocab))
			}
			batch = append(batch, q)
		}
		before := minorFaults(b)
		began := time.Now()
		if _, err := text.Forward(batch); err != nil {
			b.Fatal(err)
		}
		steps[i] += time.Since(began)
		faults[i] += minorFaults(b) - before
	}
}

func minorFaults(b *testing.B) int64 {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return int64(u.Minflt)
}

// BenchmarkTwoUsers reports what a second user of a model costs: this process maps a set twice, as two clients, and the
// kernel says how much of what each maps counts for it alone.
func BenchmarkTwoUsers(b *testing.B) {
	bytes := benchBytes(b)
	d, socket := weightsDaemon(b, bytes)
	set := hbm.WeightSet{Key: hbm.Key{1}}
	for range 96 {
		set.Sizes = append(set.Sizes, bytes/96)
	}
	for b.Loop() {
		for i := range 2 {
			w, err := dial(b, socket, hbm.Hello{Instance: fmt.Sprint("i", i)}).OpenWeights(b.Context(), 0, set,
				func(context.Context, []int, [][]byte) error { return nil }, nil)
			if err != nil {
				b.Fatal(err)
			}
			if err := w.Populate(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
	}
	rss, pss := weightMaps(b)
	b.ReportMetric(float64(rss>>20), "mapped-MiB")
	b.ReportMetric(float64(pss>>20), "PSS-MiB")
	b.ReportMetric(float64(d.Stats().Shared[0].Used>>20), "booked-MiB")
}

// weightMaps sums Rss and Pss of this process's maps of the HMM's memory, in bytes.
func weightMaps(b *testing.B) (rss, pss int64) {
	b.Helper()
	data, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		b.Fatal(err)
	}
	ours := false
	for _, line := range strings.Split(string(data), "\n") {
		var n int64
		switch {
		case strings.Contains(line, "-") && strings.Contains(line, " r"):
			ours = strings.Contains(line, "trireme-hbm")
		case ours && strings.HasPrefix(line, "Rss:"):
			fmt.Sscanf(line, "Rss: %d kB", &n)
			rss += n << 10
		case ours && strings.HasPrefix(line, "Pss:"):
			fmt.Sscanf(line, "Pss: %d kB", &n)
			pss += n << 10
		}
	}
	return rss, pss
}
