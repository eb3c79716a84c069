package prefill_test

import (
	"slices"
	"testing"

	"trireme.dev/services/prefill"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/stage"
	"trireme.dev/shared/stage/stagetest"
	"trireme.dev/shared/wire"
)

// A request that whoever runs it dies of is quarantined, and nobody else: here each process that has taken it is killed. Those that
// were in the same batch the first time run alone, too, and are computed.
func TestKillerIsQuarantined(t *testing.T) {
	t.Setenv(childRows, "8192") // one chunk: no progress before the end
	r := newRig(t, stagetest.Long)
	long := r.Model.Greedy(slices.Repeat(stagetest.Cases(t)[1].Input, 250), 5) // 7,000 tokens
	killer := r.start(long)
	mates := map[string]*wire.Spec{}
	for i := range 3 {
		spec := r.Model.Greedy(stagetest.Cases(t)[1+i%2].Input, 5)
		mates[r.start(spec).Request.ID] = spec
	}
	part := hbm.Part{Request: killer.Request.ID, Attempt: 1, Stage: stage.Prefill}
	told := func() bool { return len(r.gateway.Lost(0)) > 0 }
	free := func() bool {
		t.Helper()
		parts, err := r.HBM.Unclaimed(t.Context(), []hbm.Part{part})
		if err != nil {
			t.Fatal(err)
		}
		return len(parts) == 1
	}
	deaths := 0
	for ; !told(); deaths++ {
		if deaths > 20 {
			t.Fatal("it is not quarantined")
		}
		process := r.ProcessWith(stagetest.Middle{Seqs: 1, Rows: len(long.Prompt)})
		r.Until("a process computes the request, or has quarantined it", func() bool { return told() || process.Holds() })
		if told() {
			break
		}
		process.Kill()
		r.Until("the HMM has noticed", func() bool {
			orphans, err := r.HBM.Orphans(t.Context(), stage.Prefill)
			if err != nil {
				t.Fatal(err)
			}
			for _, o := range orphans {
				if err := r.Bus.NakReply(o.Reply, 0); err != nil {
					t.Fatal(err)
				}
			}
			return free()
		})
	}
	if deaths < stage.Quarantine {
		t.Errorf("quarantined after %d deaths", deaths)
	}
	lost := r.gateway.Lost(1)
	if len(lost) != 1 || lost[0].Request != killer.Request.ID || !lost[0].Final || lost[0].Code != wire.CodeQuarantined {
		t.Errorf("the gateway was told %+v", lost)
	}
	r.Done(killer.Request.ID, -1)
	r.prefill(prefill.Config{})
	r.Empty(stage.Prefill)
	for key, m := range r.decodes(len(mates)) {
		got := r.open(m)
		if id, want := r.token(got.log, 0), r.Model.Answer(mates[m.Request.ID], 0).IDs[0]; id != want {
			t.Errorf("%s begins with %d, alone %d", key, id, want)
		}
	}
}

// A prefill that is killed in the middle of a chunk leaves the prompt a strike if nobody's chunks had got further than before, and
// none, and takes back those that there were, if they had. The next process begins the prompt again, and gets what it is without deaths.
func TestKilledInTheMiddleOfAChunk(t *testing.T) {
	t.Setenv(childRows, "64")
	r := newRig(t, stagetest.Long)
	spec := r.Model.Greedy(slices.Repeat(stagetest.Cases(t)[1].Input, 20), 5) // nine chunks
	m := r.start(spec)
	part := hbm.Part{Request: m.Request.ID, Attempt: 1, Stage: stage.Prefill}
	for round, x := range []struct{ chunks, strikes int }{{3, 0}, {0, 1}, {3, 2}, {5, 0}, {5, 1}} {
		r.KillInTheMiddle(stage.Prefill, 1, stagetest.Middle{Seqs: 1, After: x.chunks})
		if got := r.Left(stage.Prefill, part)[0].Strikes(); got != x.strikes {
			t.Errorf("round %d: killed behind %d chunks: %d strikes, want %d", round, x.chunks, got, x.strikes)
		}
	}
	r.prefill(prefill.Config{})
	r.Empty(stage.Prefill)
	for _, d := range r.decodes(1) {
		if id, want := r.token(r.open(d).log, 0), r.Model.Answer(spec, 0).IDs[0]; id != want {
			t.Errorf("the answer begins with %d, without deaths with %d", id, want)
		}
	}
	r.gateway.NothingLost()
	r.Done(m.Request.ID, -1)
}
