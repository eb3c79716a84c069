package hmm_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
)

// Tests here run parts of themselves in child processes: the test binary again, with the part in childPart and the
// socket in childSocket. A child writes a line of JSON when it is where it should be, and then sleeps for ever.
const (
	childPart   = "HMM_TEST_CHILD"
	childSocket = "HMM_TEST_SOCKET"
)

// report is what a child says.
type report struct {
	Handles []mem.Handle
	NPUs    []int
	Held    bool

	Refusals []string // of a hog: what each of its wants ended with
}

func child(part string) int {
	ctx := context.Background()
	hello := hbm.Hello{Instance: "child", Role: "decode", NPUs: 1}
	if part == "named" {
		hello.Name = "decoder-0"
	}
	c, err := hbm.Dial(ctx, os.Getenv(childSocket), hello)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	r := report{NPUs: c.NPUs()}
	switch part {
	case "writer": // one object that the request keeps, one that only this process holds, and a claim
		objects, err := c.Alloc(ctx,
			hbm.Spec{Kind: mem.KindKV, NPU: 0, Bytes: 5*page + 1, Ref: ref("r", 1)}, kv(0, 3*page))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		for i, o := range objects {
			fill(o, byte(i+1))
			r.Handles = append(r.Handles, o.Handle())
		}
		k, err := c.Claim(ctx, decodePart("r", 1, 0), "ack.child")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		r.Held = k.Held()
	case "loader": // stops in the middle of a weight set
		if err := loadHalf(ctx, c); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	case "copier": // copies weights at a byte a second
		copySlowly(ctx, c)
	case "hog": // takes all that it is given and never frees
		for npu := mem.HostNPU; npu < 2; npu++ {
			for err == nil {
				_, err = c.Alloc(ctx, hbm.Spec{Kind: mem.KindPixels, NPU: npu, Bytes: page})
			}
			r.Refusals = append(r.Refusals, err.Error())
			err = nil
		}
		for i := 0; err == nil; i++ {
			_, err = c.Claim(ctx, decodePart("hog", 1, i), "")
		}
		r.Refusals = append(r.Refusals, err.Error())
	case "runner": // runs part 0, leaves part 1 waiting, and comes some way with part 2
		for i := range 3 {
			k, err := c.Claim(ctx, decodePart("r", 1, i), "")
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			if i == 1 {
				continue
			}
			k.Run()
			if i == 2 {
				k.Progress(7)
			}
		}
	case "idle", "named":
	default:
		fmt.Fprintln(os.Stderr, "no such part:", part)
		return 2
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		return 1
	}
	select {}
}

// start runs a part in a child process, which is killed at the latest at the end of the test.
func start(t *testing.T, part, socket string) (*exec.Cmd, report) {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childPart+"="+part, childSocket+"="+socket)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { kill(t, cmd) })
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err != nil {
		t.Fatalf("child %s: %v", part, err)
	}
	var r report
	must(t, json.Unmarshal(line, &r))
	return cmd, r
}

// kill ends a child with SIGKILL; once dead it stays dead.
func kill(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if cmd.ProcessState == nil {
		must(t, cmd.Process.Kill())
		_ = cmd.Wait() // says that it was killed
	}
}

func TestKilledWriter(t *testing.T) {
	d, socket := daemon(t)
	reader := dial(t, socket, hbm.Hello{Role: "decode"})
	writer, said := start(t, "writer", socket)
	if !said.Held || len(said.NPUs) != 1 {
		t.Errorf("the child said %+v", said)
	}
	check := func(o *hbm.Object, seed byte) {
		t.Helper()
		for i, b := range o.Bytes() {
			if b != seed+byte(i*7) {
				t.Fatalf("byte %d is %d, the writer wrote %d", i, b, seed+byte(i*7))
			}
		}
	}
	own := attach(t, reader, mem.ReadOnly, 1, said.Handles[1])[0]
	check(own, 2)
	free(t, reader, own)

	kill(t, writer)
	eventually(t, "the dead process's hold ends", func() bool { return d.Stats().Objects == 1 })
	_, err := reader.Attach(t.Context(), mem.ReadOnly, -1, said.Handles[1])
	wantErr(t, err, mem.ErrGone)
	kept := attach(t, reader, mem.ReadWrite, 1, said.Handles[0])[0]
	check(kept, 1)
	orphans, err := reader.Orphans(t.Context(), "decode")
	must(t, err)
	if len(orphans) != 1 || orphans[0].Reply != "ack.child" {
		t.Errorf("orphans: %+v", orphans)
	}
	free(t, reader, kept)
	must(t, reader.End(t.Context(), "r"))
	eventually(t, "the connection is gone", func() bool { return d.Stats().Connections == 1 })
	empty(t, d)
}

// TestSuccessorGetsTheNPU shows that NPUs of a process that has just died are there for the one started in its place.
func TestSuccessorGetsTheNPU(t *testing.T) {
	d, socket := daemon(t)
	dial(t, socket, hbm.Hello{Instance: "other", NPUs: 1})
	for range 5 {
		cmd, said := start(t, "idle", socket)
		if len(said.NPUs) != 1 || said.NPUs[0] != 1 {
			t.Fatalf("NPUs: %v", said.NPUs)
		}
		kill(t, cmd)
		eventually(t, "the HMM knows that its connection has ended", func() bool { return d.Stats().Connections == 1 })
	}
}
