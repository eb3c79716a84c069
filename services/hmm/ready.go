package hmm

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/mem"
)

const (
	readyAgain = time.Second // until what has been taken of the ready memory is made up for: an operation takes more than once
	readyShort = time.Minute // until it is tried again when the system had none left
)

// spare is the part of all memory that is left to others: behind that the system does not refuse memory, but ends a process to have some.
const spare = 16

// keepReady keeps memory ready until ctx ends. It takes processor time that nobody else wants: what is taken too late only costs whoever
// wants it what it would have cost anyway.
func (d *Daemon) keepReady(ctx context.Context) {
	runtime.LockOSThread() // and never unlocked, so that the thread, which is of no use to others now, ends with this goroutine
	if err := unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 19); err != nil {
		d.log.Warn("memory is readied with everybody else's priority", "error", err)
	}
	said := false
	for {
		pause, err := readyAgain, d.readyAll(ctx)
		if err != nil {
			pause = readyShort
			if !said {
				d.log.Warn("no more memory is readied for now", "error", err)
			}
		}
		said = err != nil
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

// readyAll readies what is missing, in all spaces, until ctx ends. ErrExhausted when the system has too little left.
func (d *Daemon) readyAll(ctx context.Context) error {
	for space, bytes := range d.ready {
		for d.stores[space].Unready(bytes) > 0 && ctx.Err() == nil {
			if free, total, err := d.free(); err == nil && free < total/spare {
				return fmt.Errorf("%v of %v are free, which are left to others: %w", conf.Bytes(free), conf.Bytes(total), mem.ErrExhausted)
			}
			if more, err := d.stores[space].Ready(bytes); err != nil {
				return err
			} else if !more {
				break
			}
		}
	}
	return nil
}
