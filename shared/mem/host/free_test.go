package host

import (
	"os"
	"path/filepath"
	"testing"
)

func TestFree(t *testing.T) {
	if free, total, err := Free(); err != nil || free < 1<<20 || total < free || total > 1<<50 {
		t.Errorf("%d bytes free of %d, %v", free, total, err)
	}
	const machine = "MemTotal:        1000 kB\nMemFree:           10 kB\nMemAvailable:     600 kB\n"
	for _, x := range []struct {
		name        string
		files       map[string]string
		free, total int64
	}{
		{"no groups", nil, 600 << 10, 1000 << 10},
		{"a container", map[string]string{
			"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "512000\n", "sys/fs/cgroup/memory.current": "400000\n",
			"sys/fs/cgroup/memory.stat": "anon 1\nfile 150000\ninactive_file 100000\nactive_file 50000\n",
		}, 212000, 512000},
		{"a container without a limit", map[string]string{
			"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "400000\n",
		}, 600 << 10, 1000 << 10},
		{"a container that has too much", map[string]string{
			"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1000\n", "sys/fs/cgroup/memory.current": "2000\n",
		}, 0, 1000},
		{"a service, in a slice with less", map[string]string{
			"proc/self/cgroup":                               "4:memory:/old\n0::/a.slice/b.service\n",
			"sys/fs/cgroup/a.slice/memory.max":               "300000\n",
			"sys/fs/cgroup/a.slice/memory.current":           "200000\n",
			"sys/fs/cgroup/a.slice/b.service/memory.max":     "500000\n",
			"sys/fs/cgroup/a.slice/b.service/memory.current": "100000\n",
		}, 100000, 300000},
	} {
		root := t.TempDir()
		files := map[string]string{"proc/meminfo": machine}
		for name, text := range x.files {
			files[name] = text
		}
		for name, text := range files {
			file := filepath.Join(root, name)
			if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if free, total, err := freeUnder(root); err != nil || free != x.free || total != x.total {
			t.Errorf("%s: %d bytes free of %d, want %d of %d, %v", x.name, free, total, x.free, x.total, err)
		}
	}
	if _, _, err := freeUnder(t.TempDir()); err == nil {
		t.Error("a system that says nothing has memory")
	}
}
