package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/wire"
)

// roleCmd has an NPU go over to an instance of another role.
type roleCmd struct {
	NPU string `arg:"" name:"npu" help:"The NPU as trireme status names it: node/index."`
	To  string `arg:"" name:"role" help:"encoder, prefill or decoder, or letters of an instance with several roles, as EP."`
	changeFlags
}

// Help is shown by `trireme role --help`.
func (roleCmd) Help() string {
	return `The NPU leaves the instance that has it, and joins one of the role on its node: the one with the fewest NPUs, which may be a standby,
unless --instance names another. These are two operations. Both instances go on meanwhile, and answers stay the same bit by bit. An instance
that has no NPU then stands by, if others have its roles. If the second cannot be done the NPU stays spare. --timeout is for both together.

Examples:
  trireme role node1/3 prefill
  trireme role node1/3 decoder --instance decoder-1 --dry-run
  trireme role node1/0 encoder --json | jq '.leave.total_ns + .join.total_ns'`
}

// Run has the NPU go over.
func (c *roleCmd) Run(e *env) error {
	if err := c.check(); err != nil {
		return err
	}
	slash := strings.LastIndexByte(c.NPU, '/')
	number, err := strconv.Atoi(c.NPU[slash+1:])
	if slash < 1 || err != nil || number < 0 {
		return fmt.Errorf("%w%q is no NPU: write node/index, as trireme status does", errUsage, c.NPU)
	}
	q := bus.RoleSwitch{Node: c.NPU[:slash], NPU: number, Instance: c.Instance}
	c.apply(&q.Change)
	if q.Role, err = bus.RoleNamed(c.To); err != nil {
		return err
	}
	return c.among(e, func(ctx context.Context, b *bus.Bus, all []wire.Instance) error {
		r, err := b.SwitchRole(ctx, all, q, c.told(e))
		if c.JSON && (err == nil || r.Moves) {
			return errors.Join(err, writeJSON(e.out, r))
		}
		if err != nil {
			return err
		}
		return c.print(e.out, r)
	})
}

// print writes what has become of the NPU, or would.
func (c *roleCmd) print(w io.Writer, r *bus.RoleReport) error {
	if !r.Moves {
		_, err := fmt.Fprintln(w, "nothing to do: it is so already")
		return err
	}
	if r.Leave != nil {
		fmt.Fprintf(w, "%s leaves %s\n", r.NPU, r.Leave.Instance)
		if err := printChange(w, r.Leave, c.DryRun); err != nil {
			return err
		}
	}
	fmt.Fprintf(w, "%s joins %s\n", r.NPU, r.Join.Instance)
	return printChange(w, r.Join, c.DryRun)
}
