package stagetest

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"

	"trireme.dev/shared/hbm"
)

// childStrike makes a test binary a process that runs a part, JSON of an hbm.Part, until it is killed.
const childStrike = "STAGETEST_STRIKE"

func runToDeath(text string) error {
	var p hbm.Part
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		return err
	}
	ctx := context.Background()
	c, err := hbm.Dial(ctx, os.Getenv(childHMM), hbm.Hello{Instance: "victim", Role: p.Stage})
	if err != nil {
		return err
	}
	k, err := c.Claim(ctx, p, "stagetest.nowhere")
	if err != nil {
		return err
	}
	k.Run()
	fmt.Println("runs")
	select {}
}

// Strike has n processes die, one after the other, while they run a part: it has that many strikes more. The test binary's TestMain
// calls Child.
func (r *Rig) Strike(p hbm.Part, n int) {
	r.tb.Helper()
	exe, err := os.Executable()
	if err != nil {
		r.tb.Fatal(err)
	}
	text, err := json.Marshal(p)
	if err != nil {
		r.tb.Fatal(err)
	}
	for range n {
		before := r.Stats().Connections
		cmd := exec.Command(exe)
		cmd.Env = append(os.Environ(), childStrike+"="+string(text), childHMM+"="+r.Stage.HMM)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			r.tb.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			r.tb.Fatal(err)
		}
		_, err = out.Read(make([]byte, 1))
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // says that it was killed
		if err != nil {
			r.tb.Fatalf("who was to run %+v to death: %v", p, err)
		}
		r.Until("the HMM has noticed a death", func() bool { return r.Stats().Connections == before })
		if _, err := r.HBM.Orphans(r.tb.Context(), p.Stage); err != nil { // there is no message to hand back
			r.tb.Fatal(err)
		}
	}
}
