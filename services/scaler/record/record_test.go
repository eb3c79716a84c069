package record_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"trireme.dev/services/scaler/record"
	"trireme.dev/shared/sched/autoscale"
)

func moment() time.Time { return time.Unix(1e9, 0).UTC() }

// noisy is a load that comes by chance, tenfold in the middle, and a fleet that does nothing about it.
func noisy(seconds int, f func(*autoscale.View)) {
	r := rand.New(rand.NewPCG(1, 2))
	known := autoscale.Signal{Known: true}
	v := autoscale.View{Spare: map[string][]int{"n": {3, 4, 5}}, Costs: map[autoscale.Action]autoscale.Cost{autoscale.Widen: {Time: 1234567}}}
	for i, roles := range []string{"E", "P", "D"} {
		v.Instances = append(v.Instances, autoscale.Instance{Signal: known, ID: roles, Name: roles, Node: "n", Roles: roles, NPUs: []int{i}, Ready: true})
	}
	for s := range seconds {
		n := r.ExpFloat64() * 3
		if s > seconds/2 {
			n *= 10
		}
		v.Now += time.Second + time.Duration(r.IntN(1e6))
		v.Demand.Signal = known
		v.Demand.Requests += n
		v.Demand.Prompt += 100 * n * r.Float64()
		v.Demand.Output += 30 * n
		for k := range v.Queues {
			v.Queues[k] = autoscale.Queue{Signal: known, InWork: r.IntN(9)}
		}
		v.Instances[1].Busy, v.Instances[1].Rate[autoscale.Prefill] = 0.1+0.2*r.Float64(), 900+50*r.Float64()
		v.Instances[2].Steps = []autoscale.Step{{Batch: 1 + r.IntN(9), Took: time.Duration(r.IntN(3e7))}}
		copied := v
		f(&copied)
	}
}

// write records and returns what was decided.
func write(t *testing.T, file string, most int64, seconds int) (changes int) {
	t.Helper()
	p := autoscale.Default()
	w, err := record.Create(file, most, "s", p, moment)
	if err != nil {
		t.Fatal(err)
	}
	state := autoscale.New(p)
	noisy(seconds, func(v *autoscale.View) {
		if v.Now > 60*time.Second && p.Band != 0.3 { // another policy on the way
			p.Band = 0.3
			state.SetPolicy(p)
			if err := w.SetPolicy(p); err != nil {
				t.Fatal(err)
			}
		}
		d := state.Decide(v)
		if d.Change.Action != autoscale.None {
			changes++
		}
		if err := w.Write(v, &d); err != nil {
			t.Fatal(err)
		}
	})
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return changes
}

func replay(t *testing.T, file string, p *autoscale.Policy) (all []byte, same, changes, steps int) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = record.Replay(f, p, func(s *record.Step) error {
		steps++
		all = append(append(all, s.Text...), '\n')
		if s.Same() {
			same++
		}
		if s.Decision.Change.Action != autoscale.None {
			changes++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all, same, changes, steps
}

// A replay decides as the scaler did, byte for byte, as often as it is made; another policy decides otherwise.
func TestReplayDecidesTheSame(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "record")
	decided := write(t, file, record.DefaultSize, 300)
	if decided < 2 {
		t.Fatalf("%d changes are no story", decided)
	}
	first, same, changes, steps := replay(t, file, nil)
	if steps != 300 || same != steps || changes != decided {
		t.Errorf("%d decisions of %d are the recorded ones, %d changes of %d", same, steps, changes, decided)
	}
	again, _, _, _ := replay(t, file, nil)
	if !bytes.Equal(first, again) {
		t.Error("two replays differ")
	}
	p := autoscale.Default()
	p.Actions = nil
	if _, same, changes, _ := replay(t, file, &p); changes != 0 || same == steps {
		t.Errorf("with nothing allowed %d changes, and %d decisions as recorded", changes, same)
	}
	// Another run behind it, which begins with nothing remembered; and one that was cut off.
	write(t, file, record.DefaultSize, 100)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, data[:len(data)-7], 0o600); err != nil {
		t.Fatal(err)
	}
	if _, same, _, steps := replay(t, file, nil); steps != 399 || same != steps {
		t.Errorf("%d decisions of %d are the recorded ones", same, steps)
	}
}

// A full file makes room for the next one, which says that it goes on from there.
func TestRecordIsBounded(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "record")
	const most = 100 << 10
	write(t, file, most, 1000)
	for _, name := range []string{file, file + ".1"} {
		info, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}
		if info.Size() > most+16<<10 {
			t.Errorf("%s has %d bytes", name, info.Size())
		}
		if _, _, _, steps := replay(t, name, nil); steps == 0 {
			t.Errorf("%s has no decisions", name)
		}
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(string(data), `{"began":{"scaler":"s","time":"2001-09-09T01:46:40Z","continues":true}}`) {
			t.Errorf("%s begins with %.100s", name, data)
		}
	}
	if all, err := filepath.Glob(file + "*"); err != nil || len(all) != 2 {
		t.Errorf("%v, %v", all, err)
	}
}

func TestNoRecord(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"", "hello\n", "{}\n", `{"view":{"now_ns":1}}` + "\n"} {
		err := record.Replay(strings.NewReader(text), nil, func(*record.Step) error { return nil })
		if !errors.Is(err, record.ErrRecord) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
