package main

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"trireme.dev/shared/conf"
	"trireme.dev/shared/sched/placement"
	"trireme.dev/shared/wire"
)

// scaleCmd gives a running instance another number of NPUs.
type scaleCmd struct {
	Who  string     `arg:"" name:"instance" help:"decoder, prefill or encoder, where one runs, or an instance's id or name."`
	NPUs npuCount   `arg:"" name:"npus" help:"How many NPUs it shall have, or how many more or fewer: 4, +1 or -2."`
	Rate conf.Bytes `name:"copy-rate" help:"Most bytes of weights that are copied in a second, beside serving; 0: as fast as it goes." default:"0" placeholder:"SIZE"`
	changeFlags
}

// Help is shown by `trireme scale --help`.
func (scaleCmd) Help() string {
	return `The instance goes on meanwhile: spare NPUs of its node join it, or some of its own leave it and are spare then. Nothing is refused or
drained, and answers stay the same bit by bit. If it cannot be done everything stays as it is.

Examples:
  trireme scale decoder 4
  trireme scale decoder-1 +1 --dry-run
  trireme scale decoder -2 --timeout 5m
  trireme scale decoder 4 --json | jq .total_ns`
}

// Run has the instance scaled.
func (c *scaleCmd) Run(e *env) error {
	return c.run(e, c.Who, func(i *wire.Instance) (wire.Change, error) {
		npus, err := c.NPUs.of(len(i.NPUs))
		return wire.Change{Kind: wire.ChangeScale, NPUs: npus, Rate: int64(c.Rate)}, err
	})
}

// npuCount is a number of NPUs as operators write it: 4, +1, or -2.
type npuCount struct {
	n        int
	relative bool
}

// minus is what a minus is written as between the command line and npuCount: the parser takes -2 for a flag.
const minus = "\u2212"

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *npuCount) UnmarshalText(text []byte) error {
	s := strings.Replace(string(text), minus, "-", 1)
	n, err := strconv.Atoi(s)
	if err != nil || n > placement.MaxNPUs || n < -placement.MaxNPUs {
		return fmt.Errorf("%q is no number of NPUs: write 4, +1 or -2", s)
	}
	c.n, c.relative = n, s[0] == '+' || s[0] == '-'
	return nil
}

// of is how many NPUs an instance with so many is to have.
func (c npuCount) of(has int) (int, error) {
	n := c.n
	if c.relative {
		n += has
	}
	if n < 1 || n > placement.MaxNPUs {
		return 0, fmt.Errorf("%wan instance of %d NPUs cannot have %d: 1 to %d", errUsage, has, n, placement.MaxNPUs)
	}
	return n, nil
}

var negative = regexp.MustCompile(`^-[0-9]+$`)

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

// meant is the instance that an operator means: by a role that one instance has, or by id or name.
func meant(all []wire.Instance, who, which string) (*wire.Instance, error) {
	role := map[string]string{"encoder": "encode", "prefill": "prefill", "decoder": "decode"}[who]
	fits := func(i *wire.Instance) bool {
		named := func(s string) bool { return i.ID == s || i.Name != "" && i.Name == s }
		return i.Role != "gateway" && (role == "" && named(who) || role != "" && wire.HasRole(i.Role, role)) && (which == "" || named(which))
	}
	var found []wire.Instance
	var names []string
	for _, i := range all {
		if fits(&i) {
			found = append(found, i)
			names = append(names, cmp.Or(i.Name, i.ID))
		}
	}
	switch {
	case len(found) == 1:
		return &found[0], nil
	case len(found) == 0 && (role == "" || which != ""):
		return nil, fmt.Errorf("%wno such instance runs: %s; `trireme status` shows those that do", errUsage, strings.TrimSpace(who+" "+which))
	case len(found) == 0:
		return nil, fmt.Errorf("no %s runs", who)
	}
	return nil, fmt.Errorf("%w%d instances are a %s: say which with --instance: %s", errUsage, len(found), who, strings.Join(names, ", "))
}
