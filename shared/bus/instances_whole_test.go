package bus_test

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"trireme.dev/shared/bus/bustest"
	"trireme.dev/shared/wire"
)

// A view begins with every instance that is there, however many heartbeats are replaced while it is read, and begins also while others
// vanish.
func TestAViewBeginsWhole(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Run(t).URL())
	bucket, err := b.JetStream().KeyValue(t.Context(), wire.BucketInstances)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := b.JetStream().Stream(t.Context(), "KV_"+wire.BucketInstances)
	if err != nil {
		t.Fatal(err)
	}
	put := func(i wire.Instance) error {
		data, err := json.Marshal(i)
		if err != nil {
			return err
		}
		_, err = bucket.Put(t.Context(), wire.InstanceKey(&i), data)
		return err
	}
	const stay = 6
	ctx, cancel := context.WithCancel(t.Context())
	var beating sync.WaitGroup
	defer beating.Wait()
	defer cancel()
	forever := func(f func() error) {
		beating.Go(func() {
			for ctx.Err() == nil {
				if err := f(); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for n := range stay {
		i := wire.Instance{ID: fmt.Sprint("d", n), Role: "decode"}
		if err := put(i); err != nil {
			t.Fatal(err)
		}
		forever(func() error { return put(i) })
	}
	passing := wire.Instance{ID: "e0", Role: "encode"}
	forever(func() error {
		if err := put(passing); err != nil {
			return err
		}
		// As when it expires: nothing is told of it.
		return stream.Purge(t.Context(), jetstream.WithPurgeSubject("$KV."+wire.BucketInstances+"."+wire.InstanceKey(&passing)))
	})
	for range 100 {
		look, end := context.WithCancel(t.Context())
		v, err := b.Instances(look)
		if err != nil {
			t.Fatal(err)
		}
		if all := v.Role("decode"); len(all) != stay {
			t.Fatalf("%d of %d instances are there: %+v", len(all), stay, all)
		}
		end()
	}
}
