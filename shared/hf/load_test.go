package hf_test

import (
	"context"
	"errors"
	"reflect"
	"slices"
	"testing"
	"unsafe"

	"trireme.dev/shared/hf"
	"trireme.dev/shared/model"
)

// shelf is a Memory that keeps sets as an HMM does: the first who asks fills, the others get the same memory. It has
// parts of two objects, and gives up before the one with the number fail.
type shelf struct {
	t       *testing.T
	sets    map[[32]byte]map[int][]byte // objects that are final
	objects [][]byte                    // of all sets
	made    int                         // objects made
	fail    int
}

func newShelf(t *testing.T) *shelf {
	return &shelf{t: t, sets: map[[32]byte]map[int][]byte{}, fail: -1}
}

var errShelf = errors.New("the shelf broke")

func (s *shelf) Weights(ctx context.Context, want hf.Set, fill hf.Filler) ([][]byte, error) {
	set := s.sets[want.Key]
	if set == nil {
		set = map[int][]byte{}
		s.sets[want.Key] = set
	}
	var missing []int
	var fresh [][]byte
	for i, n := range want.Numbers {
		switch o, ok := set[n]; {
		case !ok:
			missing = append(missing, n)
			fresh = append(fresh, unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(make([]uint64, want.Sizes[i]/8)))), want.Sizes[i]))
		case int64(len(o)) != want.Sizes[i]:
			s.t.Fatalf("object %d has %d bytes, now %d are wanted", n, len(o), want.Sizes[i])
		}
	}
	for len(missing) > 0 {
		n := min(2, len(missing))
		if slices.Contains(missing[:n], s.fail) {
			return nil, errShelf
		}
		if err := fill(ctx, missing[:n], fresh[:n:n]); err != nil {
			return nil, err
		}
		for i, number := range missing[:n] {
			set[number] = fresh[i]
			s.objects = append(s.objects, fresh[i])
			s.made++
		}
		missing, fresh = missing[n:], fresh[n:]
	}
	var objects [][]byte
	for _, n := range want.Numbers {
		objects = append(objects, set[n])
	}
	return objects, nil
}

// TestLoad loads a model of every form into shared memory, part by part, twice, and expects the weights that were written,
// each expert in an object of its own.
func TestLoad(t *testing.T) {
	for name, f := range map[string]form{
		"transformers 4": {v4: true, shards: 3}, "transformers 5": {shards: 2}, "an expert a tensor": {perExpert: true, v4: true},
		"transformers 4, float32": {v4: true, dtype: "F32"}, "transformers 5, float32": {dtype: "F32"},
		"misaligned": {misaligned: true}, "transformers 4, misaligned": {v4: true, misaligned: true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newTiny(24)
			dir := m.write(t, f)
			s := newShelf(t)
			s.fail = 5 // in the middle: the next one goes on there
			if _, err := open(t, dir).Load(t.Context(), s, hf.All, nil); !errors.Is(err, errShelf) {
				t.Fatalf("a memory that breaks: %v", err)
			}
			s.fail = -1
			var first *model.Weights
			for range 2 {
				folder := open(t, dir)
				w, err := folder.Load(t.Context(), s, hf.All, nil)
				if err != nil {
					t.Fatal(err)
				}
				if !reflect.DeepEqual(w, &m.weights) {
					t.Fatal("the weights differ from the model that was written")
				}
				if err := folder.Populate(t.Context()); err != nil {
					t.Error(err)
				}
				if first == nil {
					first = w
				}
				for i := range w.Layers {
					for e := range w.Layers[i].Experts {
						x := w.Layers[i].Experts[e]
						if object := s.holding(x.Gate); object < 0 || s.holding(x.Up) != object || s.holding(x.Down) != object {
							t.Fatalf("expert %d of layer %d lies in objects %d, %d and %d", e, i, s.holding(x.Gate), s.holding(x.Up), s.holding(x.Down))
						}
						if &x.Gate.Data[0] != &first.Layers[i].Experts[e].Gate.Data[0] {
							t.Fatalf("expert %d of layer %d has been copied twice", e, i)
						}
					}
				}
			}
			objects := map[int]bool{}
			for _, l := range first.Layers {
				for _, x := range l.Experts {
					objects[s.holding(x.Gate)] = true
				}
			}
			if len(objects) != layers*experts {
				t.Errorf("%d experts lie in %d objects", layers*experts, len(objects))
			}
		})
	}
}

// TestSameModelOtherFiles loads a model from folders whose files lie otherwise, so that other matrices need a copy, into one
// memory, and expects the right weights from each: nothing that was kept for one may be taken for the other's.
func TestSameModelOtherFiles(t *testing.T) {
	m := newTiny(24)
	s := newShelf(t)
	digests := map[[32]byte]bool{}
	for _, f := range []form{{}, {misaligned: true}, {shards: 2}} {
		folder := open(t, m.write(t, f))
		digests[folder.Config.Digest] = true
		w, err := folder.Load(t.Context(), s, hf.All, nil)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(w, &m.weights) {
			t.Errorf("%+v: the weights differ from the model that was written", f)
		}
	}
	if len(digests) != 1 {
		t.Errorf("one model has %d digests", len(digests))
	}
	if len(s.sets) != 3 { // the experts, shared by the aligned; all matrices of the misaligned one, text and vision
		t.Errorf("%d sets were made, want 3", len(s.sets))
	}
}

// holding is the number of the object that holds a matrix, over all sets; -1 when none does.
func (s *shelf) holding(m model.Matrix) int {
	at := uintptr(unsafe.Pointer(&m.Data[0]))
	return slices.IndexFunc(s.objects, func(o []byte) bool {
		begin := uintptr(unsafe.Pointer(&o[0]))
		return at >= begin && at+uintptr(2*len(m.Data)) <= begin+uintptr(len(o))
	})
}

// TestLoadParts shows that a stage loads what it needs: an encoder no expert, a decoder nothing of the vision encoder.
func TestLoadParts(t *testing.T) {
	m := newTiny(24)
	f := open(t, m.write(t, form{shards: 2}))
	s := newShelf(t)
	w, err := f.Load(t.Context(), s, hf.Vision, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(w.Vision, m.weights.Vision) || w.Layers != nil || len(s.sets) != 0 {
		t.Errorf("the vision encoder came with %d layers and %d sets", len(w.Layers), len(s.sets))
	}
	if w, err = f.Load(t.Context(), s, hf.Text, nil); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(w.Layers, m.weights.Layers) || w.Vision != nil || len(s.sets) != 1 {
		t.Errorf("the language model came with vision %v and %d sets", w.Vision, len(s.sets))
	}

	if need, err := f.Needs(hf.Text, nil); err != nil || len(need.Sizes) != layers*experts || need.Sizes[0] != 3*24*hidden*2 {
		t.Errorf("the language model needs %d, %v", need, err)
	}
	if need, err := f.Needs(hf.Vision, nil); err != nil || len(need.Sizes) != 0 {
		t.Errorf("the vision encoder needs %d, %v", need, err)
	}

	// Another model's weights are another set, and so are those of another part.
	if _, err := open(t, newTiny(16).write(t, form{shards: 2})).Load(t.Context(), s, hf.Text, nil); err != nil || len(s.sets) != 2 {
		t.Errorf("two models have %d sets, %v", len(s.sets), err)
	}
	float := open(t, m.write(t, form{dtype: "F32"}))
	if _, err := float.Load(t.Context(), s, hf.All, nil); err != nil || len(s.sets) != 4 {
		t.Errorf("%d sets with those of float32, %v", len(s.sets), err)
	}
}

// TestLoadExperts shows that an NPU gets the experts that it wants and no others, and that others are other objects of the same set.
func TestLoadExperts(t *testing.T) {
	for name, f := range map[string]form{
		"transformers 4": {v4: true}, "transformers 5": {shards: 2}, "an expert a tensor": {perExpert: true, v4: true},
	} {
		t.Run(name, func(t *testing.T) {
			m := newTiny(24)
			folder := open(t, m.write(t, f))
			s := newShelf(t)
			for part := range 2 {
				wanted := func(layer, expert int) bool { return (layer+expert)%2 == part }
				w, err := folder.Load(t.Context(), s, hf.Text, wanted)
				if err != nil {
					t.Fatal(err)
				}
				if len(s.sets) != 1 || s.made != (part+1)*layers*experts/2 {
					t.Errorf("%d halves are %d objects of %d sets", part+1, s.made, len(s.sets))
				}
				need, err := folder.Needs(hf.Text, wanted)
				if err != nil || len(need.Numbers) != layers*experts/2 || s.sets[need.Key] == nil {
					t.Errorf("half %d needs %+v, %v", part, need, err)
				}
				for l := range w.Layers {
					for e, x := range w.Layers[l].Experts {
						want := model.Expert{}
						if wanted(l, e) {
							want = m.weights.Layers[l].Experts[e]
						}
						if !reflect.DeepEqual(x, want) {
							t.Errorf("half %d has another expert %d of layer %d", part, e, l)
						}
					}
					w.Layers[l].Experts = m.weights.Layers[l].Experts
				}
				if !reflect.DeepEqual(w.Layers, m.weights.Layers) {
					t.Errorf("half %d has another model", part)
				}
			}
		})
	}
}

// TestLoadEnds shows that loading ends with its context.
func TestLoadEnds(t *testing.T) {
	f := open(t, newTiny(24).write(t, form{v4: true}))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Load(ctx, newShelf(t), hf.All, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("loading after the end: %v", err)
	}
	if err := f.Populate(ctx); err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Load(t.Context(), newShelf(t), hf.All, nil); err == nil {
		t.Error("a closed folder has weights")
	}
}
