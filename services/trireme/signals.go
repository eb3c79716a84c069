package main

import (
	"context"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
)

// serves says whether a command runs until a signal ends it.
func serves(n *kong.Node) bool {
	switch n.ClosestGroup().Key {
	case "Run":
		return true
	case "Services": // others look into one: scaler status, check and replay
		return n.Parent.Type == kong.ApplicationNode || n.Name == "run"
	}
	return false
}

// interrupted is why the context of a command ends: a signal.
type interrupted syscall.Signal

func (i interrupted) Error() string { return syscall.Signal(i).String() + " signal received" }

// Is says that it is a way to be cancelled.
func (i interrupted) Is(target error) bool { return target == context.Canceled }

// interruptible returns a context that the first SIGINT or SIGTERM ends, with interrupted as its cause. Another one, or the same after
// an echo, ends the process at once, and its children with it.
func interruptible() (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	c, over := make(chan os.Signal, 4), make(chan struct{})
	deaf := signal.Ignored(os.Interrupt) // as a shell has what it starts in the background
	signal.Notify(c, os.Interrupt, syscall.SIGTERM)
	go func() {
		var f first
		for {
			select {
			case s := <-c:
				switch s := s.(syscall.Signal); {
				case ctx.Err() == nil:
					f.signal, f.at = s, time.Now()
					cancel(interrupted(s))
				case f.again(s, time.Now()):
					if s == syscall.SIGINT && deaf { // without a handler it would be ignored again
						os.Exit(128 + int(s))
					}
					signal.Reset(s)
					_ = syscall.Kill(os.Getpid(), s)
				}
			case <-over:
				return
			}
		}
	}()
	return ctx, sync.OnceFunc(func() {
		signal.Stop(c)
		close(over)
		cancel(nil)
	})
}

// first is the signal that ends a command in order.
type first struct {
	signal syscall.Signal
	at     time.Time
}

// echo is for how long the same signal is part of the first one: who ends a command with timeout(1) sends it two, the second one to its
// process group, and a key that is pressed may bounce.
const echo = time.Second

// again says whether another signal is one of its own.
func (f *first) again(s syscall.Signal, now time.Time) bool {
	return s != f.signal || now.Sub(f.at) >= echo
}
