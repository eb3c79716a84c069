package main

import (
	"bytes"
	"fmt"
	"maps"
	"regexp"
	"slices"

	"github.com/alecthomas/kong"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/wire"
)

// scaleCmd gives a running instance another number of NPUs.
type scaleCmd struct {
	Who  string   `arg:"" name:"instance" help:"decoder, prefill or encoder, where one runs, or an instance's id or name."`
	NPUs npuCount `arg:"" name:"npus" optional:"" help:"How many NPUs it shall have, or how many more or fewer: 4, +1 or -2."`
	changeFlags

	Replicas *int   `help:"Instead: how many instances of the kind there shall be, a process each. Whoever runs them has to be asked: this asks trireme up." placeholder:"N" env:"-"` // TRIREME_REPLICAS is of NATS
	Node     string `help:"Node of the instances of --replicas, where there are several." placeholder:"NAME"`
}

// Help is shown by `trireme scale --help`.
func (scaleCmd) Help() string {
	return `The instance goes on meanwhile: spare NPUs of its node join it, or some of its own leave it and are spare then. Nothing is refused or
drained, and answers stay the same bit by bit. If it cannot be done everything stays as it is. With --replicas it is the number of instances that
changes: new ones start on spare NPUs, and those started last hand over what they have in work, and end. Instances that stand by from the start
(1Dx0 in a topology) are not counted.

What is printed: "balance" is how evenly experts load the NPUs (1: no NPU waits for another), an "epoch" is one more with each change of an instance,
"copies" are experts that an NPU has, which cost nothing where NPUs share memory.

Examples:
  trireme scale decoder 4
  trireme scale decoder-1 +1 --dry-run
  trireme scale decoder -2 --timeout 5m
  trireme scale decoder 4 --json | jq .total_ns
  trireme scale decoder --replicas 2
  trireme scale EPD --replicas 3                      of a topology like 2EPD`
}

// Run has the instance scaled.
func (c *scaleCmd) Run(e *env) error {
	switch {
	case c.Replicas != nil && c.NPUs.Given:
		return fmt.Errorf("%w--replicas says how many instances there shall be, %q how many NPUs one has: give one of them", errUsage, c.NPUs.String())
	case c.Replicas != nil:
		return c.runReplicas(e)
	case !c.NPUs.Given:
		return fmt.Errorf("%wscale %s: to how many NPUs? Write 4, +1 or -2, or --replicas and how many instances", errUsage, c.Who)
	}
	change := wire.Change{Kind: wire.ChangeScale}
	change.NPUs, change.By = c.NPUs.Change()
	return c.run(e, c.Who, change)
}

// npuCount is a conf.NPUCount whose minus may be written as shielded does.
type npuCount struct {
	conf.NPUCount
	Given bool
	text  string
}

// String is what was written.
func (c npuCount) String() string { return c.text }

// minus is what a minus is written as between the command line and npuCount: the parser takes -2 for a flag.
const minus = "\u2212"

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *npuCount) UnmarshalText(text []byte) error {
	plain := bytes.Replace(text, []byte(minus), []byte("-"), 1)
	c.Given, c.text = true, string(plain)
	return c.NPUCount.UnmarshalText(plain)
}

var negative = regexp.MustCompile(`^-[0-9]+$`)

// glued are the arguments of a command line with negative numbers joined to the flags before them, `--last=-3` for `--last -3`: the parser
// takes -3 for a flag, and it would be said of that what is to be said of the number. valued are the flags that take a value.
func glued(args []string, valued map[string]bool) []string {
	var all []string
	for i := 0; i < len(args); i++ {
		if args[i] == "--" {
			return append(all, args[i:]...)
		}
		if i+1 < len(args) && valued[args[i]] && negativeValue.MatchString(args[i+1]) {
			all = append(all, args[i]+"="+args[i+1])
			i++
			continue
		}
		all = append(all, args[i])
	}
	return all
}

var negativeValue = regexp.MustCompile(`^-[0-9.]`)

// valued are the flags of a command line, as --last, that take a value, whichever command they are of.
func valued(n *kong.Node) map[string]bool {
	all, switches := map[string]bool{}, map[string]bool{}
	var walk func(n *kong.Node)
	walk = func(n *kong.Node) {
		for _, f := range n.Flags {
			all["--"+f.Name] = true
			if f.IsBool() {
				switches["--"+f.Name] = true
			}
		}
		for _, child := range n.Children {
			walk(child)
		}
	}
	walk(n)
	maps.DeleteFunc(all, func(name string, _ bool) bool { return switches[name] })
	return all
}

// shielded are the arguments of a command line, with the minus of -2 in `scale decoder -2` written as the parser does not take for the
// beginning of a flag. There are no flags of digits.
func shielded(args []string) []string {
	scale := slices.Index(args, "scale")
	if scale < 0 {
		return args
	}
	args = slices.Clone(args)
	for i := scale + 1; i < len(args); i++ {
		if negative.MatchString(args[i]) {
			args[i] = minus + args[i][1:]
		}
	}
	return args
}
