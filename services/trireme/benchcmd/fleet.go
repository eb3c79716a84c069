package benchcmd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
)

// fleet is a whole system of a topology, `trireme up` as a child of this process.
type fleet struct {
	*crew
	url  string // of the gateway
	nats string // URL
}

// onFleet starts a fleet, has do use it, and ends it. pace is the profile of its NPUs, "" for none.
func onFleet(e Env, topology, pace string, args []string, do func(*fleet) error) error {
	f := new(fleet)
	return onThread(func() (err error) {
		if f.crew, err = newCrew(e.Context); err != nil {
			return err
		}
		if err = f.up(topology, pace, args); err != nil {
			err = errors.Join(f.because(err), f.close())
		}
		return err
	}, func() (err error) {
		defer func() { err = errors.Join(err, f.close()) }()
		if err := do(f); err != nil {
			return f.because(err)
		}
		return nil
	})
}

// up starts the system and waits until it is ready.
func (f *fleet) up(topology, pace string, args []string) error {
	at, err := freeAddress()
	if err != nil {
		return err
	}
	http, err := freeAddress()
	if err != nil {
		return err
	}
	f.nats = "nats://" + at
	all := append([]string{"up", "--topology", topology, "--http", http, "--nats", at, "--monitor", "127.0.0.1:0",
		"--data", f.dir, "--threads", "1"}, args...)
	if pace != "" {
		all = append(all, "--pace", pace)
	}
	said, out, err := os.Pipe()
	if err != nil {
		return err
	}
	_, err = f.start("trireme up --topology "+topology, nil, out, nil, all...)
	if err = errors.Join(err, out.Close()); err != nil {
		return errors.Join(err, said.Close())
	}
	context.AfterFunc(f.ctx, func() { _ = said.Close() }) // at the latest in close
	lines := bufio.NewScanner(said)
	for lines.Scan() {
		if url, ok := strings.CutPrefix(lines.Text(), "ready "); ok {
			f.url = url
			return nil
		}
	}
	return fmt.Errorf("starting %s: it ended before it was ready", topology)
}
