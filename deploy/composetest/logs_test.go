package composetest

import (
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// trouble finds lines of a service (slog's text format) or of NATS that tell of something wrong.
var trouble = regexp.MustCompile(`level=(WARN|ERROR)|\[(WRN|ERR|FTL)\]|panic:|fatal error:|\| trireme [a-z]+: `)

// pattern is a line that a step of the test must or may leave behind, and why.
type pattern struct {
	line  *regexp.Regexp
	cause string
}

// takenOver is what may be said when a stage is stopped or killed and its siblings go on.
var takenOver = []pattern{
	{regexp.MustCompile(`(encoder|prefill|decoder)-\d+ .*level=WARN msg="runs alone, as an instance died while it ran it" .*strikes=1\s*$`),
		"a stage killed while it computed: what it ran has a strike"},
	{regexp.MustCompile(`level=WARN msg="heartbeat failed; it is tried again" .*context deadline exceeded`),
		"a machine that is busy for a moment, or NATS killed: a heartbeat had no answer in time, and the next one makes it up"},
}

// reconnected is what may be said when the HMM, NATS, or a stage without siblings is killed.
var reconnected = []pattern{
	{regexp.MustCompile(`trireme (encoder|prefill|decoder): serving \w+: connection to the HMM has ended`),
		"HMM killed: a stage ends, and starts anew with new memory"},
	{regexp.MustCompile(`(encoder|prefill|decoder)-\d+ .*level=WARN msg="a gateway is gone: giving its requests up"`),
		"gateway killed: its lease has ended"},
	{regexp.MustCompile(`gateway-\d+ .*level=WARN msg="the HMM is lost"`), "HMM killed: the gateway connects again"},
	{regexp.MustCompile(`gateway-\d+ .*level=WARN msg="connecting to the HMM" .*(connection reset by peer|broken pipe|EOF)`),
		"HMM killed: its socket still took a connection while it died"},
	{regexp.MustCompile(`level=WARN msg="connection to NATS broke; connecting again"`), "NATS killed: clients connect again"},
	{regexp.MustCompile(`level=WARN msg="heartbeat failed; it is tried again"`), "NATS killed: a heartbeat could not be sent"},
	{regexp.MustCompile(`(gateway|encoder|prefill|decoder)-\d+ .*level=WARN msg="no HMM answers yet: waiting for`),
		"HMM killed: who was started again before it waits for it"},
	{regexp.MustCompile(`nats-\d+ .*\[WRN\] Filestore \[\w+\] Stream state detected prior state, could not locate msg block`),
		"NATS killed: it reads its streams without the index that it writes when it is stopped"},
	{regexp.MustCompile(`nats-\d+ .*\[WRN\] Filestore \[\w+\] Stream state outdated, last block has additional entries, will rebuild`),
		"NATS killed: it reads its streams anew behind an index that it wrote before"},
	{regexp.MustCompile(`nats-\d+ .*\[WRN\] Filestore \[\w+\] Recovering stream state from index errored: prior state file`),
		"NATS killed: it reads its streams without the index that it writes when it is stopped"},
}

// collected is what all containers have written, those that are gone too.
type collected struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements io.Writer.
func (c *collected) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.Write(p)
}

func (c *collected) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String()
}

// follow begins to collect the logs of containers that are not followed yet, until they are removed or the test ends.
// (docker compose logs -f, of Compose 2.40, panics when a container is removed.)
func (s *stack) follow(t *testing.T) {
	t.Helper()
	if s.written == nil {
		s.written, s.followed = &collected{}, map[string]bool{}
		t.Cleanup(func() {
			s.followers.Wait() // ended by the test's context
			if t.Failed() {
				t.Logf("logs of all containers:\n%s", s.written)
			}
		})
	}
	for _, c := range s.containers(t, "") {
		if s.followed[c.ID] {
			continue
		}
		s.followed[c.ID] = true
		s.followers.Go(func() { s.collect(s.ctx, c) })
	}
}

// collect follows one container through its restarts. Lines may come twice.
func (s *stack) collect(ctx context.Context, c container) {
	name := strings.TrimPrefix(c.Name, "/"+s.project+"-")
	since := "0"
	for ctx.Err() == nil {
		next := strconv.FormatInt(time.Now().Unix()-1, 10)
		cmd := exec.CommandContext(ctx, "docker", "logs", "--follow", "--since", since, c.ID)
		cmd.Stdout, cmd.Stderr = &prefixed{to: s.written, name: name}, &prefixed{to: s.written, name: name}
		cmd.WaitDelay = 5 * time.Second
		if cmd.Run() != nil && ctx.Err() == nil {
			return // it is removed
		}
		since = next
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// prefixed writes whole lines with a name before them.
type prefixed struct {
	to   *collected
	name string
	rest []byte
}

// Write implements io.Writer.
func (p *prefixed) Write(b []byte) (int, error) {
	p.rest = append(p.rest, b...)
	for {
		i := bytes.IndexByte(p.rest, '\n')
		if i < 0 {
			return len(b), nil
		}
		fmt.Fprintf(p.to, "%s | %s\n", p.name, p.rest[:i])
		p.rest = p.rest[i+1:]
	}
}

// expectLogs checks that what was written since the last call has no sign of trouble but the explained ones.
func (s *stack) expectLogs(t *testing.T, explained []pattern) {
	var now []string
	for line := range strings.Lines(s.compose(t, "logs", "--no-color")) {
		_, said, _ := strings.Cut(line, " | ")
		now = append(now, strings.TrimSpace(said))
	}
	await(t, "the collected logs have all that the containers' have", 20*time.Second, func() bool {
		so := s.written.String()
		return !slices.ContainsFunc(now, func(said string) bool { return !strings.Contains(so, said) })
	})
	if len(now) < 10 {
		t.Errorf("%d lines of logs: the test looks in the wrong place", len(now))
	}
	out := s.written.String()[s.read:]
	s.read += len(out)
	seen := map[string]int{}
lines:
	for line := range strings.Lines(out) {
		if !trouble.MatchString(line) {
			continue
		}
		for _, e := range explained {
			if e.line.MatchString(line) {
				seen[e.cause]++
				continue lines
			}
		}
		t.Errorf("unexplained: %s", strings.TrimSpace(line))
	}
	for cause, n := range seen {
		t.Logf("%d lines: %s", n, cause)
	}
	for _, c := range s.containers(t, "") {
		if c.State.OOMKilled {
			t.Errorf("%s ran out of memory", c.Name)
		}
	}
}
