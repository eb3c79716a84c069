package benchcmd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"

	"golang.org/x/sync/errgroup"

	"trireme.dev/shared/hbm"
	"trireme.dev/shared/hbm/hbmbench"
	"trireme.dev/shared/mem"
)

// echoSocket is the descriptor at which the second process finds its end of a socket to serve pings on.
const echoSocket = 3

// order asks the second process for so many objects; it frees those that it gave before.
type order struct {
	Objects int   `json:"objects"`
	Bytes   int64 `json:"bytes"`
}

// given answers an order.
type given struct {
	Handles []mem.Handle `json:"handles"`
	Error   string       `json:"error,omitempty"`
}

// give is the second process: a client of the HMM that allocates and writes what its parent orders, one JSON object a
// line, and answers its pings.
func give(ctx context.Context, socket string, in io.Reader, out io.Writer) error {
	f := os.NewFile(echoSocket, "socket")
	conn, err := net.FileConn(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("this command is a part of `trireme bench memory`, which starts it: %w", err)
	}
	c, err := hbm.Dial(ctx, socket, hbm.Hello{Instance: "giver", Role: "prefill"})
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	var g errgroup.Group
	g.Go(func() error { return hbmbench.Echo(conn) })
	err = obey(ctx, c, in, out)
	err = errors.Join(err, conn.Close())
	_ = g.Wait() // its connection was taken from it
	return errors.Join(err, c.Close())
}

func obey(ctx context.Context, c *hbm.Client, in io.Reader, out io.Writer) error {
	orders, answers := json.NewDecoder(in), json.NewEncoder(out)
	var held []*hbm.Object
	for {
		var o order
		if err := orders.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("reading an order: %w", err)
		}
		err := c.Free(ctx, held...)
		held = nil
		if err == nil {
			held, err = hbmbench.Give(ctx, c, o.Objects, o.Bytes)
		}
		var a given
		for _, h := range held {
			a.Handles = append(a.Handles, h.Handle())
		}
		if err != nil {
			a.Error = err.Error()
		}
		if err := answers.Encode(a); err != nil {
			return fmt.Errorf("answering an order: %w", err)
		}
	}
}
