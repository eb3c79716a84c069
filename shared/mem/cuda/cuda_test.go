package cuda_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"

	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/cuda"
	"trireme.dev/shared/mem/memtest"
)

// gpu is the GPU of all tests, as a context takes half a second to make; nil when there is none, for the reason noGPU.
var (
	gpu   *cuda.Device
	noGPU error
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	gpu, noGPU = cuda.Open(0)
	if noGPU != nil && (memtest.IsChild() || !errors.Is(noGPU, mem.ErrNotSupported)) {
		fmt.Fprintln(os.Stderr, "opening the GPU:", noGPU)
		return 1
	}
	if gpu != nil {
		defer gpu.Close()
		if err := warm(); err != nil {
			fmt.Fprintln(os.Stderr, "first use of the GPU:", err)
			return 1
		}
	}
	return memtest.Main(m, backend())
}

// warm does everything once: the driver opens descriptors at first use and keeps them.
func warm() error {
	page := gpu.Info().Page
	store, err := cuda.NewStore(gpu, page)
	if err != nil {
		return err
	}
	defer store.Close()
	space, err := cuda.OpenSpace(gpu, page)
	if err != nil {
		return err
	}
	defer space.Close()
	e := mem.Extent{Bytes: page}
	if err := store.Back(e); err != nil {
		return err
	}
	f, err := store.Export(e)
	if err != nil {
		return err
	}
	if err := space.Import(e, f); err != nil {
		return err
	}
	at, err := space.Map(e, mem.ReadWrite)
	if err != nil {
		return err
	}
	p := make([]byte, page)
	return errors.Join(gpu.Write(at, p), gpu.Read(p, at), gpu.Copy(at, at+uintptr(page/2), page/2))
}

func backend() memtest.Backend {
	return memtest.Backend{
		New: func(t *testing.T) (mem.Store, func() mem.Space) {
			dev := gpu.Traced(memtest.Trace(t))
			s := store(t, dev, memtest.Pages)
			return s, func() mem.Space { return space(t, dev, memtest.Pages) }
		},
		Open: func(_ *os.File, bytes int64) (mem.Space, error) { return cuda.OpenSpace(gpu, bytes) },
		Peek: func(p []byte, at uintptr) error { return gpu.Read(p, at) },
		Poke: func(at uintptr, p []byte) error { return gpu.Write(at, p) },
	}
}

func needGPU(t *testing.T) {
	t.Helper()
	if gpu == nil {
		t.Skipf("no GPU: %v", noGPU)
	}
}

func store(t *testing.T, dev *cuda.Device, pages int64) *cuda.Store {
	t.Helper()
	s, err := cuda.NewStore(dev, pages*dev.Info().Page)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func space(t *testing.T, dev *cuda.Device, pages int64) *cuda.Space {
	t.Helper()
	s, err := cuda.OpenSpace(dev, pages*dev.Info().Page)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// TestProbe runs everywhere: either there is a GPU and it works, or the probe says that there is none.
func TestProbe(t *testing.T) {
	infos, err := cuda.Devices()
	if (err == nil) != (gpu != nil) {
		t.Fatalf("Devices() = %v, %v, but Open said %v", infos, err, noGPU)
	}
	if err != nil {
		if !errors.Is(err, mem.ErrNotSupported) || !errors.Is(noGPU, mem.ErrNotSupported) {
			t.Errorf("Devices: %v, Open: %v, want ErrNotSupported", err, noGPU)
		}
		t.Logf("no GPU: %v", err)
		return
	}
	if len(infos) == 0 || infos[0] != gpu.Info() || infos[0].Name == "" || infos[0].Page <= 0 || infos[0].Bytes < infos[0].Page {
		t.Errorf("Devices() = %+v, the open one is %+v", infos, gpu.Info())
	}
	if _, err := cuda.Open(len(infos) + 100); !errors.Is(err, mem.ErrInvalid) {
		t.Errorf("opening a GPU that is not there: %v, want ErrInvalid", err)
	}
	t.Logf("%+v", infos)
}

func TestErrors(t *testing.T) {
	for code, want := range map[int]error{
		1: mem.ErrInvalid, 2: mem.ErrExhausted, 100: mem.ErrNotSupported, 400: mem.ErrInvalid, 700: cuda.ErrFault, 801: mem.ErrNotSupported,
	} {
		err := fmt.Errorf("doing: %w", &cuda.Error{Call: "cuInit", Code: code, Text: "text"})
		if !errors.Is(err, want) {
			t.Errorf("%v is not %v", err, want)
		}
		if s := err.Error(); !strings.Contains(s, "cuInit") || !strings.Contains(s, fmt.Sprint(code)) {
			t.Errorf("error reads %q", s)
		}
	}
	for _, e := range []cuda.Error{{Code: 999}, {Call: "cuMemImportFromShareableHandle", Code: 998}} {
		if err := errors.Unwrap(&e); err != nil {
			t.Errorf("%v stands for %v", &e, err)
		}
	}
	if err := error(&cuda.Error{Call: "cuMemMap", Code: 801}); !errors.Is(err, mem.ErrInvalid) || errors.Is(err, mem.ErrNotSupported) {
		t.Errorf("%v is not just ErrInvalid", err)
	}
}

func TestConformance(t *testing.T) {
	needGPU(t)
	before, err := gpu.Free()
	if err != nil {
		t.Fatal(err)
	}
	memtest.Run(t, backend())
	if after, err := gpu.Free(); err != nil || after != before {
		t.Errorf("%d bytes of the GPU are free after the suite and all its processes, %d before: %v", after, before, err)
	}
}

func TestNotWholePages(t *testing.T) {
	needGPU(t)
	for _, n := range []int64{0, -1, gpu.Info().Page - 1} {
		if _, err := cuda.NewStore(gpu, n); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("NewStore(%d): %v, want ErrInvalid", n, err)
		}
		if _, err := cuda.OpenSpace(gpu, n); !errors.Is(err, mem.ErrInvalid) {
			t.Errorf("OpenSpace(%d): %v, want ErrInvalid", n, err)
		}
	}
}

func TestExhausted(t *testing.T) {
	needGPU(t)
	memtest.NoLeaks(t)
	dev := gpu.Traced(memtest.Trace(t))
	pages := 2 * dev.Info().Bytes / dev.Info().Page
	s := store(t, dev, pages)
	e := mem.Extent{Bytes: s.Bytes()}
	err := s.Back(e)
	if !errors.Is(err, mem.ErrExhausted) || !strings.Contains(err.Error(), fmt.Sprint(dev.Info().Bytes)) {
		t.Errorf("backing twice the GPU's memory: %v, want ErrExhausted with the sizes", err)
	}
	if err := s.Drop(e); err != nil {
		t.Errorf("dropping what could not be backed: %v", err)
	}
	if err := s.Back(mem.Extent{Bytes: s.Page()}); err != nil {
		t.Errorf("after running out: %v", err)
	}
}

// TestManyThreads has goroutines, which wander between threads, use one store and one space.
func TestManyThreads(t *testing.T) {
	needGPU(t)
	memtest.NoLeaks(t)
	dev := gpu.Traced(memtest.Trace(t))
	const workers, each, rounds = 8, 4, 5
	st, sp := store(t, dev, workers*each), space(t, dev, workers*each)
	free, err := dev.Free()
	if err != nil {
		t.Fatal(err)
	}
	work := func(w int64) error {
		for round := range int64(rounds) {
			for i := range int64(each) {
				e := mem.Extent{Offset: (w*each + i) * st.Page(), Bytes: st.Page()}
				if err := cycle(dev, st, sp, e, byte(1+w*rounds+round)); err != nil {
					return err
				}
			}
		}
		return nil
	}
	var all sync.WaitGroup
	for w := range int64(workers) {
		all.Go(func() {
			if err := work(w); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if now, err := dev.Free(); err != nil || now != free {
		t.Errorf("%d bytes of the GPU are free after all was dropped, %d before: %v", now, free, err)
	}
}

// cycle is the life of an extent.
func cycle(dev *cuda.Device, st *cuda.Store, sp *cuda.Space, e mem.Extent, value byte) error {
	if err := st.Back(e); err != nil {
		return err
	}
	f, err := st.Export(e)
	if err != nil {
		return err
	}
	if err := sp.Import(e, f); err != nil {
		return err
	}
	at, err := sp.Map(e, mem.ReadWrite)
	if err != nil {
		return err
	}
	want, got := bytes.Repeat([]byte{value}, int(e.Bytes)), make([]byte, e.Bytes)
	half := uintptr(e.Bytes / 2)
	if err := errors.Join(dev.Write(at, want[:half]), dev.Copy(at+half, at, int64(half)), dev.Read(got, at)); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%v holds other bytes than were written", e)
	}
	return errors.Join(sp.Unmap(e), sp.Forget(e), st.Drop(e))
}
