package main

import (
	"context"
	"io"
	"time"

	"github.com/nats-io/nats.go"

	"trireme.dev/services/trireme/modelcmd"
	"trireme.dev/shared/hbm"
)

// lookEvery is the time between two looks at how far the weights are loaded.
const lookEvery = 250 * time.Millisecond

// watchLoading shows a person at a terminal how far the weights are loaded that stages wait for, as the HMMs tell it, until
// the returned function is called.
func watchLoading(ctx context.Context, url string, w io.Writer) (stop func()) {
	show := modelcmd.LoadProgress(w, modelcmd.LoadingWeights)
	if show == nil {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conn, err := nats.Connect(url, nats.Name("up"))
		if err != nil {
			return // who starts something is told elsewhere why it does not start
		}
		defer conn.Close()
		for ctx.Err() == nil {
			if all, err := nodes(ctx, conn); err == nil {
				if done, total := loading(all); total > 0 {
					show(done, total)
				}
			}
			select {
			case <-time.After(lookEvery):
			case <-ctx.Done():
			}
		}
	}()
	return func() {
		cancel()
		<-ended
	}
}

// loading is how many bytes of the weight sets on these nodes are there and how many there will be; nothing when all are
// whole.
func loading(all []hbm.Stats) (done, total int64) {
	for _, n := range all {
		for _, w := range n.Weights {
			done += w.Loaded
			total += max(w.Bytes, w.Wanted)
		}
	}
	if done == total {
		return 0, 0
	}
	return done, total
}
