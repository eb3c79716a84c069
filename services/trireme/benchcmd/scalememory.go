package benchcmd

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	"trireme.dev/services/trireme/scaling"
	"trireme.dev/shared/conf"
	"trireme.dev/shared/hbm"
	"trireme.dev/shared/mem"
	"trireme.dev/shared/mem/host"
	"trireme.dev/shared/wire"
)

// npuMemory is an NPU's memory for sequences.
const npuMemory = conf.Bytes(256 << 20)

// readyMemory is how much memory each of so many NPUs is to have before the change: what it may get by it, unless the machine has less. An
// accelerator has its memory from the start. Ways with other NPUs for what is new get none: they wait for the disk.
func (c *Scale) readyMemory(w way, npus int) (int64, error) {
	if w.apart {
		return 0, nil
	}
	most := int64(c.Bytes) / 16 // experts of a rebalance, and the like
	before, after := c.members(c.From), c.members(c.To)
	for i := range after {
		had, has := int64(before[i].npus), int64(after[i].npus)
		gets := int64(c.Bytes) / has
		if has < had && len(w.unlike) == 0 {
			gets -= int64(c.Bytes) / had // what it has stays
		}
		if has != had {
			most = max(most, gets)
		}
	}
	if w.adds { // a copy of all
		most = max(most, int64(c.Bytes)/int64(c.To-c.From))
	}
	room, _, err := host.Free()
	if err != nil {
		return 0, err
	}
	held := int64(len(before)) * (int64(c.Bytes) + int64(c.Bytes)/8 + 256<<20) // by the instances before
	return max(0, min(most+int64(npuMemory), (room/10*8-held)/int64(npus))) / mem.HostPage * mem.HostPage, nil
}

// awaitReady waits until the NPUs have it.
func (s *site) awaitReady() error {
	ctx, cancel := context.WithTimeout(s.ctx, s.scale.Longest)
	defer cancel()
	for {
		stats, err := s.stats(ctx)
		if err != nil {
			return fmt.Errorf("asking the HMM for its memory: %w", err)
		}
		var unready int64
		for _, space := range stats.Spaces {
			unready += space.Unready
		}
		if unready == 0 {
			return nil
		}
		select {
		case <-time.After(memoryEvery):
		case <-ctx.Done():
			return fmt.Errorf("waiting for the NPUs' memory, of which %v are missing (--no-ready does not): %w", conf.Bytes(unready), context.Cause(ctx))
		}
	}
}

// stats are the HMM's.
func (s *site) stats(ctx context.Context) (stats hbm.Stats, err error) {
	msg, err := s.bus.Conn().RequestWithContext(ctx, wire.SubjectHMM, nil)
	if err == nil {
		err = json.Unmarshal(msg.Data, &stats)
	}
	return stats, err
}

// memoryEvery is the time between two looks at the HMM's books.
const memoryEvery = 20 * time.Millisecond

// watchMemory looks at what the NPUs have in use, until the function that it returns is called.
func (s *site) watchMemory() func() []scaling.Memory {
	var all []scaling.Memory
	var watching sync.WaitGroup
	ctx, stop := context.WithCancel(s.ctx)
	watching.Go(func() {
		for ctx.Err() == nil {
			if stats, err := s.stats(ctx); err == nil {
				all = append(all, scaling.Memory{At: time.Now(), Bytes: inUse(stats)})
			}
			select {
			case <-time.After(memoryEvery):
			case <-ctx.Done():
			}
		}
	})
	return func() []scaling.Memory {
		stop()
		watching.Wait()
		return all
	}
}

// inUse is the memory of NPUs, weights included, that more than a cache keeps.
func inUse(s hbm.Stats) (sum int64) {
	for _, m := range append(s.Memory[1:], s.Shared...) { // the first is the host's own
		sum += m.Used + m.Padded - m.Cached
	}
	return sum
}
