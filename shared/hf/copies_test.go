package hf_test

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"

	"trireme.dev/shared/hf"
)

// TestCache opens one folder several times, as the processes of a node do, with one place for copies.
func TestCache(t *testing.T) {
	m := newTiny(24)
	dir := m.write(t, form{v4: true, shards: 2})
	cache := filepath.Join(t.TempDir(), "not", "there")
	var made atomic.Int64 // times that the copies were made
	load := func() error {
		f, err := hf.Open(dir)
		if err != nil {
			return err
		}
		defer f.Close()
		f.Cache = cache
		f.Progress = func(done, total int64) {
			if done == total {
				made.Add(1)
			}
		}
		w, err := f.Weights()
		if err == nil && !reflect.DeepEqual(w, &m.weights) {
			err = errors.New("the weights differ from the model that was written")
		}
		return err
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := load(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := made.Load(); n != 1 {
		t.Errorf("the copies were made %d times", n)
	}
	files, err := filepath.Glob(filepath.Join(cache, "*"))
	if err != nil || len(files) != 1 || filepath.Ext(files[0]) != ".bf16" {
		t.Fatalf("files %q, %v; want one of copies", files, err)
	}

	// What a process that died left, and a file that is not whole, are written anew.
	if err := os.Rename(files[0], files[0]+".part"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(files[0], []byte("cut"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(files[0]+".part", []byte("rubbish"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := load(); err != nil {
		t.Error(err)
	}
	if err := load(); err != nil {
		t.Error(err)
	}
	if n := made.Load(); n != 2 {
		t.Errorf("the copies were made %d times, want once more than before", n)
	}

	// Another model has another file.
	m = newTiny(16)
	dir = m.write(t, form{v4: true, shards: 2})
	if err := load(); err != nil {
		t.Error(err)
	}
	cache = filepath.Join(files[0], "below a file")
	if err := load(); err == nil {
		t.Error("no error for a cache that cannot be")
	}
}

// TestCacheUnused checks that a folder without copies makes no file.
func TestCacheUnused(t *testing.T) {
	f := open(t, newTiny(24).write(t, form{}))
	f.Cache = filepath.Join(t.TempDir(), "cache")
	if _, err := f.Weights(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(f.Cache); !os.IsNotExist(err) {
		t.Errorf("the cache is there: %v", err)
	}
}
