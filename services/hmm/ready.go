package hmm

import (
	"context"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const (
	readyAgain = time.Second // until what has been taken of the ready memory is made up for: an operation takes more than once
	readyShort = time.Minute // until it is tried again when the system had none left
)

// keepReady keeps memory ready until ctx ends. It takes processor time that nobody else wants: what is taken too late only costs whoever
// wants it what it would have cost anyway.
func (d *Daemon) keepReady(ctx context.Context) {
	runtime.LockOSThread() // and never unlocked, so that the thread, which is of no use to others now, ends with this goroutine
	if err := unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 19); err != nil {
		d.log.Warn("memory is readied with everybody else's priority", "error", err)
	}
	for {
		pause := readyAgain
		for space, bytes := range d.ready {
			for more := true; more && ctx.Err() == nil; {
				var err error
				if more, err = d.stores[space].Ready(bytes); err != nil {
					d.log.Warn("no more memory is readied for now", "error", err)
					more, pause = false, readyShort
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}
