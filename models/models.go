// Package models carries the model that is part of the binary and writes it to disk for those who map it. It does not
// read or understand model folders; shared/hf does.
package models

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Default is the name of the bundled model, and of its folder.
const Default = "shapes-vl-moe"

//go:embed shapes-vl-moe
var bundled embed.FS

// Unpack writes the bundled model to dataDir/models/shapes-vl-moe, unless it is there already, and returns that path.
// Every file is compared byte for byte with the bundled one; a missing or damaged file is replaced by renaming a good
// one over it, so a process that has mapped the old file keeps what it has. Files that are not the model's are left
// alone. Calls at the same time, from one process or several, wait for each other. An error names the file.
func Unpack(dataDir string) (dir string, err error) {
	parent := filepath.Join(dataDir, "models")
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", fmt.Errorf("unpacking the bundled model: %w", err)
	}
	unlock, err := lock(filepath.Join(parent, ".lock"))
	if err != nil {
		return "", fmt.Errorf("unpacking the bundled model: %w", err)
	}
	defer unlock()

	dir = filepath.Join(parent, Default)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		err = unpackNew(dir)
		if err != nil {
			return "", fmt.Errorf("unpacking the bundled model: %w", err)
		}
		return dir, nil
	}
	if err := repair(dir); err != nil {
		return "", fmt.Errorf("unpacking the bundled model: %w", err)
	}
	return dir, nil
}

// lock takes an exclusive lock on the file at path, creating it, and returns the function that gives it back. The
// kernel gives it back too when the process dies.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}

// unpackNew writes the whole model beside dir and renames it into place. The caller holds the lock, so the temporary
// name can be fixed, and what a call that died left there is removed.
func unpackNew(dir string) error {
	tmp := filepath.Join(filepath.Dir(dir), "."+filepath.Base(dir)+".tmp")
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o755); err != nil {
		return err
	}
	err := eachFile(func(name string, content []byte) error {
		return os.WriteFile(filepath.Join(tmp, name), content, 0o644)
	})
	if err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	return os.Rename(tmp, dir)
}

// repair replaces each file of dir that differs from the bundled one.
func repair(dir string) error {
	return eachFile(func(name string, content []byte) error {
		file := filepath.Join(dir, name)
		same, err := equal(file, content)
		if err != nil || same {
			return err
		}
		tmp := filepath.Join(dir, "."+name+".tmp")
		if err := os.WriteFile(tmp, content, 0o644); err != nil {
			return errors.Join(err, os.Remove(tmp))
		}
		return os.Rename(tmp, file)
	})
}

// eachFile calls do for every file of the bundled model, in order of name, until an error.
func eachFile(do func(name string, content []byte) error) error {
	entries, err := bundled.ReadDir(Default)
	if err != nil {
		panic("BUG: the bundled model is not in the binary: " + err.Error())
	}
	for _, e := range entries {
		content, err := bundled.ReadFile(path.Join(Default, e.Name()))
		if err != nil {
			panic("BUG: a file of the bundled model is not in the binary: " + err.Error())
		}
		if err := do(e.Name(), content); err != nil {
			return err
		}
	}
	return nil
}

// equal says whether the file holds exactly content. A file that does not exist, or is no regular file, does not.
func equal(file string, content []byte) (bool, error) {
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() || info.Size() != int64(len(content)) {
		return false, nil
	}
	f, err := os.Open(file)
	if err != nil {
		return false, err
	}
	defer f.Close()
	buf := make([]byte, 1<<20)
	for len(content) > 0 {
		n, err := io.ReadFull(f, buf[:min(len(buf), len(content))])
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return false, nil // cut since Stat
		}
		if err != nil {
			return false, err
		}
		if !bytes.Equal(buf[:n], content[:n]) {
			return false, nil
		}
		content = content[n:]
	}
	return true, nil
}
