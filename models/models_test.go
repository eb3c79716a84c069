package models_test

import (
	"bytes"
	"crypto/sha256"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"trireme.dev/models"
)

// digests returns the SHA-256 of every file in dir by name.
func digests(t *testing.T, dir string) map[string][32]byte {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	sums := map[string][32]byte{}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		sums[e.Name()] = sha256.Sum256(b)
	}
	return sums
}

func requireModel(t *testing.T, dir string) {
	t.Helper()
	want, got := digests(t, models.Default), digests(t, dir)
	if len(want) < 10 {
		t.Fatalf("the repository's model has only %d files", len(want))
	}
	for name, sum := range want {
		if got[name] != sum {
			t.Errorf("%s differs from the repository's, or is missing", name)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d files, want %d", len(got), len(want))
	}
}

func TestUnpack(t *testing.T) {
	data := filepath.Join(t.TempDir(), "not", "there")
	dir, err := models.Unpack(data)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(data, "models", models.Default); dir != want {
		t.Errorf("unpacked to %s, want %s", dir, want)
	}
	requireModel(t, dir)

	before, err := os.Stat(filepath.Join(dir, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := models.Unpack(data); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(filepath.Join(dir, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	if !os.SameFile(before, after) {
		t.Error("an undamaged file was written again")
	}
}

func TestUnpackRepairs(t *testing.T) {
	const weights = "model-00002-of-00003.safetensors"
	tests := []struct {
		name   string
		damage func(dir string) error
	}{
		{"missing file", func(dir string) error { return os.Remove(filepath.Join(dir, "tokenizer.json")) }},
		{"cut file", func(dir string) error { return os.Truncate(filepath.Join(dir, weights), 1000) }},
		{"longer file", func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "config.json"), bytes.Repeat([]byte("x"), 1<<16), 0o644)
		}},
		{"one bit in the last byte", func(dir string) error {
			b, err := os.ReadFile(filepath.Join(dir, weights))
			if err != nil {
				return err
			}
			b[len(b)-1] ^= 1
			return os.WriteFile(filepath.Join(dir, weights), b, 0o644)
		}},
		{"left by a call that died", func(dir string) error {
			tmp := filepath.Join(filepath.Dir(dir), "."+models.Default+".tmp")
			if err := os.Rename(dir, tmp); err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(tmp, "stray"), nil, 0o644)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			data := t.TempDir()
			dir, err := models.Unpack(data)
			if err != nil {
				t.Fatal(err)
			}
			if err := tt.damage(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := models.Unpack(data); err != nil {
				t.Fatal(err)
			}
			requireModel(t, dir)
		})
	}
}

func TestUnpackAtTheSameTime(t *testing.T) {
	data := t.TempDir()
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() { _, errs[i] = models.Unpack(data) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
	requireModel(t, filepath.Join(data, "models", models.Default))
}

func TestUnpackNamesWhatFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := models.Unpack(file); err == nil || !bytes.Contains([]byte(err.Error()), []byte(file)) {
		t.Errorf("unpacking below a file: %v; want an error that names it", err)
	}
}
