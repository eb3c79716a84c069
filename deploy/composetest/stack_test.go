// Package composetest tests compose.yaml for real: the images, containers, networks and volumes of a running project.
// .ci/compose builds, starts and names the project; without one the test is skipped and says so.
package composetest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const root = "../.."

// stack is the running project.
type stack struct {
	project, url, monitor string

	ctx       context.Context // of the whole test
	written   *collected      // logs
	read      int             // bytes of them that were looked at
	followed  map[string]bool // containers by id
	followers sync.WaitGroup
}

// open finds the project that .ci/compose has started.
func open(t *testing.T) *stack {
	t.Helper()
	project := os.Getenv("TRIREME_COMPOSE_PROJECT")
	if project == "" {
		t.Skip("no compose project runs: .ci/compose starts one, runs this test on it and removes it")
	}
	return &stack{
		ctx:     t.Context(),
		project: project,
		url:     "http://127.0.0.1:" + os.Getenv("TRIREME_HTTP_PORT"),
		monitor: "http://127.0.0.1:" + os.Getenv("TRIREME_MONITOR_PORT"),
	}
}

// docker runs the docker command and returns what it writes.
func docker(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	var out, failure bytes.Buffer
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Stdout, cmd.Stderr = &out, &failure
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("docker %s: %w\n%s", strings.Join(args, " "), err, failure.String())
	}
	return out.String(), nil
}

// compose runs docker compose on the project.
func (s *stack) compose(t *testing.T, args ...string) string {
	t.Helper()
	out, err := docker(t.Context(), append([]string{"compose", "-f", root + "/compose.yaml", "-p", s.project}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// scale sets the number of containers of services, as in encoder=2, and waits until all are healthy.
func (s *stack) scale(t *testing.T, to ...string) {
	t.Helper()
	args := []string{"up", "-d", "--no-build", "--no-recreate", "--wait", "--wait-timeout", "120"}
	for _, x := range to {
		args = append(args, "--scale", x)
	}
	begin := time.Now()
	s.compose(t, args...)
	s.follow(t)
	t.Logf("scaled to %s in %.1f s", strings.Join(to, " "), time.Since(begin).Seconds())
}

// container is what the engine says of one.
type container struct {
	ID           string
	Name         string
	RestartCount int
	State        struct {
		Pid       int
		Running   bool
		OOMKilled bool
		Health    struct{ Status string }
	}
	NetworkSettings struct {
		Networks map[string]struct{ IPAddress string }
	}
}

// address is the container's own address in the project's network.
func (c *container) address() string {
	for _, n := range c.NetworkSettings.Networks {
		return n.IPAddress
	}
	return ""
}

// containers lists those of a service, of all services if it is "".
func (s *stack) containers(t *testing.T, service string) []container {
	t.Helper()
	filter := []string{"ps", "-aq", "--no-trunc", "--filter", "label=com.docker.compose.project=" + s.project}
	if service != "" {
		filter = append(filter, "--filter", "label=com.docker.compose.service="+service)
	}
	ids, err := docker(t.Context(), filter...)
	if err != nil {
		t.Fatal(err)
	}
	var found []container
	if ids == "" {
		return nil
	}
	out, err := docker(t.Context(), append([]string{"inspect"}, strings.Fields(ids)...)...)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(out), &found); err != nil {
		t.Fatal(err)
	}
	return found
}

// first is one container of a service.
func (s *stack) first(t *testing.T, service string) container {
	t.Helper()
	all := s.containers(t, service)
	if len(all) == 0 {
		t.Fatalf("service %s has no container", service)
	}
	return all[0]
}

// kill ends the container's main process as a crash does: by a signal from the host, so that the restart policy holds.
func kill(t *testing.T, c container) {
	t.Helper()
	if c.State.Pid < 2 {
		t.Fatalf("%s does not run", c.Name)
	}
	if err := syscall.Kill(c.State.Pid, syscall.SIGKILL); errors.Is(err, syscall.EPERM) {
		if out, err := exec.Command("sudo", "-n", "kill", "-9", strconv.Itoa(c.State.Pid)).CombinedOutput(); err != nil {
			t.Fatalf("killing %s: %v: %s", c.Name, err, out)
		}
	} else if err != nil {
		t.Fatalf("killing %s: %v", c.Name, err)
	}
}

// await polls until ok, and says how long that took.
func await(t *testing.T, what string, limit time.Duration, ok func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	for !ok() {
		if time.Since(begin) > limit {
			t.Fatalf("not within %v: %s", limit, what)
		}
		time.Sleep(100 * time.Millisecond)
	}
	return time.Since(begin)
}

// restarted waits until a killed container runs again and is healthy.
func (s *stack) restarted(t *testing.T, was container) {
	t.Helper()
	await(t, was.Name+" runs again", time.Minute, func() bool {
		for _, c := range s.containers(t, "") {
			if c.ID == was.ID {
				return c.State.Running && c.State.Pid != was.State.Pid && c.State.Health.Status == "healthy"
			}
		}
		return false
	})
}

func get(url string) (string, error) {
	client := http.Client{Timeout: 5 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", url, resp.Status)
	}
	return string(body), nil
}

var workDone = regexp.MustCompile(`(?m)^trireme_stage_work_total\{.*\} ([0-9.e+]+)$`)

// work is how many messages a stage's container has settled since it started; -1 if it does not tell.
func work(c container) int {
	page, err := get("http://" + c.address() + ":9090/metrics")
	if err != nil {
		return -1
	}
	sum := 0.0
	for _, m := range workDone.FindAllStringSubmatch(page, -1) {
		n, _ := strconv.ParseFloat(m[1], 64)
		sum += n
	}
	return int(sum)
}

// sharedMemory is the tmpfs memory, memfds included, that is charged to the container, in bytes.
func sharedMemory(t *testing.T, c container) int64 {
	t.Helper()
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", c.State.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(groups)) {
		part := strings.SplitN(strings.TrimSpace(line), ":", 3)
		folder := ""
		switch {
		case part[1] == "memory": // cgroup 1
			folder = "/sys/fs/cgroup/memory" + part[2]
		case part[0] == "0" && part[1] == "": // cgroup 2
			folder = "/sys/fs/cgroup" + part[2]
		}
		stat, err := os.ReadFile(folder + "/memory.stat")
		if folder == "" || err != nil {
			continue
		}
		for line := range strings.Lines(string(stat)) {
			if v, ok := strings.CutPrefix(line, "shmem "); ok {
				n, err := strconv.ParseInt(strings.TrimSpace(v), 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				return n
			}
		}
	}
	t.Fatalf("no memory.stat of %s:\n%s", c.Name, groups)
	return 0
}
