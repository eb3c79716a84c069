package host

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
)

// Free is how many bytes of memory this process may still take from the system, and total how many there are: of the machine or, where that
// is less, of a control group (version 2) with a limit that it is in. What the system keeps of files, and would give up, counts as free.
func Free() (free, total int64, err error) { return freeUnder("/") }

// freeUnder is Free with /proc and /sys in a folder.
func freeUnder(root string) (free, total int64, err error) {
	meminfo, err := os.ReadFile(filepath.Join(root, "proc/meminfo"))
	if err != nil {
		return 0, 0, fmt.Errorf("asking for free memory: %w", err)
	}
	if free, err = figure(meminfo, "MemAvailable:"); err == nil {
		total, err = figure(meminfo, "MemTotal:")
	}
	if err != nil {
		return 0, 0, fmt.Errorf("asking for free memory: /proc/meminfo: %w", err)
	}
	free, total = free<<10, total<<10 // from kB
	for group := ownGroup(root); ; group = path.Dir(group) {
		dir := filepath.Join(root, "sys/fs/cgroup", group)
		limit, err1 := readNumber(filepath.Join(dir, "memory.max")) // "max", no limit, is no number
		current, err2 := readNumber(filepath.Join(dir, "memory.current"))
		if err1 == nil && err2 == nil {
			stat, err := os.ReadFile(filepath.Join(dir, "memory.stat"))
			if err == nil {
				if files, err := figure(stat, "inactive_file"); err == nil {
					current -= files
				}
			}
			free, total = min(free, max(0, limit-current)), min(total, limit)
		}
		if group == "/" {
			return free, total, nil
		}
	}
}

// ownGroup is the path of the control group of this process, "/" where it sees no more than its own.
func ownGroup(root string) string {
	text, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err == nil {
		for line := range strings.Lines(string(text)) {
			if group, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
				return path.Clean("/" + group)
			}
		}
	}
	return "/"
}

// figure is the number behind a name at the beginning of a line.
func figure(text []byte, name string) (int64, error) {
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == name {
			return strconv.ParseInt(f[1], 10, 64)
		}
	}
	return 0, errors.New("it has no " + name)
}

func readNumber(file string) (int64, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
}
