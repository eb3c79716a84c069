package hf

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// copiesVersion is part of the name of a file of copies; it is raised when their layout changes.
const copiesVersion = 1

// copies is the memory that Weights copies into: private, or a file that all processes of the node share. A file gets
// its name only when it is complete, so one that is there can be used as it is.
type copies struct {
	mapping mapping
	file    *os.File // being written, locked; nil otherwise
	path    string   // the name it will have
}

// openCopies returns memory for the copies of f's weights, and whether they are still to be made.
func (f *Folder) openCopies() (c copies, fresh bool, err error) {
	size := 2 * f.elements
	if size == 0 || f.Cache == "" {
		c.mapping, err = mapZeroed(size)
		return c, size > 0, err
	}
	if err := os.MkdirAll(f.Cache, 0o755); err != nil {
		return c, false, err
	}
	name := fmt.Sprintf("%s-%s-%d.bf16", f.Config.Name, hex.EncodeToString(f.Config.Digest[:8]), copiesVersion)
	c.path = filepath.Join(f.Cache, name)
	if c.mapping, err = mapCopies(c.path, size); c.mapping != nil || err != nil {
		return c, false, err
	}
	// Whoever gets the lock first writes; the others wait here and then find the file. The lock ends with its holder.
	if c.file, err = os.OpenFile(c.path+".part", os.O_RDWR|os.O_CREATE, 0o644); err != nil {
		return c, false, err
	}
	if err := c.prepare(size); err != nil {
		return c, false, errors.Join(err, c.discard())
	}
	return c, c.file != nil, nil
}

// prepare locks the file being written and maps it for writing, or maps the finished one if another process has
// written it meanwhile.
func (c *copies) prepare(size int) (err error) {
	for {
		if err = unix.Flock(int(c.file.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("locking %s: %w", c.file.Name(), err)
	}
	if c.mapping, err = mapCopies(c.path, size); c.mapping != nil || err != nil {
		if rm := os.Remove(c.file.Name()); !errors.Is(rm, fs.ErrNotExist) { // it was made after the rename
			err = errors.Join(err, rm)
		}
		return errors.Join(err, c.closeFile())
	}
	if err := c.file.Truncate(int64(size)); err != nil {
		return err
	}
	// Space is taken now: a full disk must be an error here, not a signal in the middle of a write to the mapping.
	err = unix.Fallocate(int(c.file.Fd()), 0, 0, int64(size))
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("making room for %d bytes in %s: %w", size, c.file.Name(), err)
	}
	c.mapping, err = unix.Mmap(int(c.file.Fd()), 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mapping %s: %w", c.file.Name(), err)
	}
	return nil
}

// mapCopies maps a finished file of copies, or returns nil if there is none of that size.
func mapCopies(path string, size int) (mapping, error) {
	m, err := mapFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil && len(m) != size {
		return nil, m.close()
	}
	return m, err
}

// seal gives a file that was written its name, once its content is safe, and forbids further writes. It does nothing
// for other memory.
func (c *copies) seal() error {
	if c.file == nil {
		return nil
	}
	if err := unix.Msync(c.mapping, unix.MS_SYNC); err != nil {
		return fmt.Errorf("writing %s: %w", c.file.Name(), err)
	}
	if err := c.file.Sync(); err != nil {
		return err
	}
	if err := unix.Mprotect(c.mapping, unix.PROT_READ); err != nil {
		return fmt.Errorf("sealing %s: %w", c.file.Name(), err)
	}
	if err := os.Rename(c.file.Name(), c.path); err != nil {
		return err
	}
	return c.closeFile()
}

// discard gives the memory back after a fault. A file that was being written stays as .part, to be written anew.
func (c *copies) discard() error {
	m := c.mapping
	c.mapping = nil
	return errors.Join(m.close(), c.closeFile())
}

// closeFile closes the file being written, if any, and so ends its lock.
func (c *copies) closeFile() error {
	f := c.file
	c.file = nil
	if f == nil {
		return nil
	}
	return f.Close()
}
