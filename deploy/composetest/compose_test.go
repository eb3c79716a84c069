package composetest

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// The steps of a life: each begins where the one before has ended, with one container of each service.
func TestCompose(t *testing.T) {
	s := open(t)
	s.follow(t)
	for _, step := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"a picture question", s.pictureQuestion},
		{"JetStream's monitoring", s.monitoring},
		{"memory is the HMM's", s.memoryIsTheHMMs},
		{"scaled under load", s.scaledUnderLoad},
		{"killed beside siblings", s.killedBesideSiblings},
		{"observed", s.observed},
		{"no unexplained error so far", func(t *testing.T) {
			s.expectLogs(t, takenOver)
			if !strings.Contains(s.written.String(), "encoder-3 ") {
				t.Error("the logs lack a container that was added")
			}
		}},
		{"killed between requests", s.killedBetweenRequests},
		{"no unexplained error", func(t *testing.T) { s.expectLogs(t, append(takenOver, reconnected...)) }},
	} {
		t.Run(step.name, step.run)
	}
}

// describe asks for a picture's description and checks the words of the answer.
func (s *stack) describe(t *testing.T, limit time.Duration) error {
	t.Helper()
	body, err := json.Marshal(map[string]any{"stream": true, "messages": []any{map[string]any{"role": "user", "content": []any{
		picture(t, root+"/docs/shapes.png"), map[string]any{"type": "text", "text": "Describe the image."},
	}}}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	answer, err := s.ask(ctx, string(body))
	if err != nil {
		return err
	}
	for _, words := range []string{"small purple circle", "large green star", "small blue cross"} {
		if !strings.Contains(answer, words) {
			t.Fatalf("the answer %q lacks %q", answer, words)
		}
	}
	return nil
}

func (s *stack) pictureQuestion(t *testing.T) {
	if err := s.describe(t, 30*time.Second); err != nil {
		t.Fatal(err)
	}
}

// What `curl :8222/jsz?consumers=true` shows has names that explain themselves.
func (s *stack) monitoring(t *testing.T) {
	page, err := get(s.monitor + "/jsz?consumers=true")
	if err != nil {
		t.Fatal(err)
	}
	var jsz struct {
		Accounts []struct {
			Streams []struct {
				Name      string
				Consumers []struct{ Name string } `json:"consumer_detail"`
			} `json:"stream_detail"`
		} `json:"account_details"`
	}
	if err := json.Unmarshal([]byte(page), &jsz); err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, a := range jsz.Accounts {
		for _, s := range a.Streams {
			for _, c := range s.Consumers {
				found = append(found, s.Name+"/"+c.Name)
			}
		}
	}
	for _, want := range []string{"TRIREME_ENCODE/encoders", "TRIREME_PREFILL/prefills", "TRIREME_DECODE/decoders"} {
		if !slices.Contains(found, want) {
			t.Errorf("no %s among %v", want, found)
		}
	}
}

// Memory of long answers is charged to the HMM, which allocates it, not to those who write it.
func (s *stack) memoryIsTheHMMs(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 4)
	for i := range cap(ended) {
		body := fmt.Sprintf(`{"messages": [{"role": "user", "content": "Count from %d to 90."}],
			"max_tokens": 3000, "ignore_eos": true, "stream": true}`, i+1)
		go func() { _, err := s.ask(ctx, body); ended <- err }()
	}
	hmm := s.first(t, "hmm")
	const grown = 8 << 20
	before := sharedMemory(t, hmm)
	await(t, "the HMM's memory grows by 8 MiB", time.Minute, func() bool {
		select {
		case err := <-ended:
			t.Fatalf("an answer ended before the memory was looked at: %v", err)
		default:
		}
		return sharedMemory(t, hmm) >= before+grown
	})
	for _, service := range []string{"prefill", "decoder", "encoder", "gateway"} {
		if n := sharedMemory(t, s.first(t, service)); n > 64<<10 {
			t.Errorf("%d bytes of shared memory are charged to %s", n, service)
		}
	}
	t.Logf("charged to the HMM: %.1f MiB of device memory; to others: none", float64(sharedMemory(t, hmm))/(1<<20))
	// The HMM sees clients of other PID namespaces end by their pidfds.
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", hmm.State.Pid))
	if err != nil {
		t.Fatal(err)
	}
	watched := 0
	for _, fd := range fds {
		if to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", hmm.State.Pid, fd.Name())); to == "anon_inode:[pidfd]" || strings.HasPrefix(to, "pidfd:") {
			watched++
		}
	}
	if watched < 4 {
		t.Errorf("the HMM watches %d processes of 4 clients: SO_PEERPIDFD needs Linux 6.5", watched)
	}
}

// New containers take work with no configuration, and stopped ones hand theirs over: no request fails.
func (s *stack) scaledUnderLoad(t *testing.T) {
	l := s.start(t, 12)
	l.more(t, 12)
	s.scale(t, "encoder=3", "decoder=2")
	for service, want := range map[string]int{"encoder": 3, "decoder": 2} {
		all := s.containers(t, service)
		if len(all) != want {
			t.Errorf("%d containers of %s, want %d", len(all), service, want)
		}
		for _, c := range all {
			await(t, c.Name+" has work", time.Minute, func() bool { return work(c) > 0 })
		}
	}
	s.scale(t, "encoder=1", "decoder=1")
	l.more(t, 24)
	s.scale(t, "prefill=2", "decoder=3")
	l.more(t, 24)
	s.scale(t, "prefill=1", "decoder=1")
	l.more(t, 24)
	l.stop(t)
	for _, c := range s.containers(t, "") {
		if c.RestartCount > 0 {
			t.Errorf("%s was restarted %d times, though nobody killed it", c.Name, c.RestartCount)
		}
	}
}

// A killed container's work is taken over by its sibling, and it comes back: no request fails.
func (s *stack) killedBesideSiblings(t *testing.T) {
	s.scale(t, "encoder=2", "prefill=2", "decoder=2")
	l := s.start(t, 12)
	for _, service := range []string{"encoder", "prefill", "decoder"} {
		l.more(t, 24)
		victim := s.first(t, service)
		at := time.Now()
		kill(t, victim)
		l.more(t, 24)
		s.restarted(t, victim)
		t.Logf("%s was killed at %s and is back after %d requests", victim.Name, at.Format("15:04:05.000"), l.answered.Load())
	}
	l.more(t, 12)
	l.stop(t)
	s.scale(t, "encoder=1", "prefill=1", "decoder=1")
}

// Those without a sibling may be killed between requests: answers come again within 30 s. A request that comes while the
// process dies may be taken by it and wait for JetStream to deliver it again, so a new one is tried every 5 s.
func (s *stack) killedBetweenRequests(t *testing.T) {
	for _, service := range []string{"hmm", "nats", "gateway", "encoder", "prefill", "decoder"} {
		victim := s.first(t, service)
		kill(t, victim)
		took := await(t, "an answer after the kill of "+service, 30*time.Second, func() bool {
			return s.describe(t, 5*time.Second) == nil
		})
		t.Logf("%s killed: answering again after %.1f s", service, took.Seconds())
		s.restarted(t, victim)
		s.scale(t) // all healthy
	}
}
