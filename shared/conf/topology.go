// Package conf reads configuration: the YAML file that flags and environment stand above, sizes of memory, and the
// notation of topologies. It knows no service.
package conf

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// ErrTopology is wrapped by errors of ParseTopology.
var ErrTopology = errors.New("invalid topology")

// Group is a number of alike instances.
type Group struct {
	Count int    // instances
	Roles string // letters of E, P, D in this order: "E", "EP", "EPD"
	NPUs  int    // of each instance; 0: they are standbys
}

// Topology says which instances run and how many NPUs they have, e.g. 5E2P1D (five encode, two prefill and one decode
// instance of one NPU each), 1Dx4 (one decode instance of four NPUs), 1Dx0 (a decode instance that stands by without NPUs), 4EPD (four
// instances with all roles), +2 (two spare NPUs).
type Topology struct {
	Groups []Group
	Spare  int // NPUs without an instance
}

var (
	groupPattern = regexp.MustCompile(`^(\d+)([EPD]+)(?:x(\d+))?`)
	sparePattern = regexp.MustCompile(`^\+(\d+)[, ]*$`)
)

const separators = ", "

const maxTopology = 1024 // instances, and NPUs of one instance

// ParseTopology reads the notation. Groups may be separated by commas or blanks, and are where digits meet: 1Px2,1Dx3.
func ParseTopology(s string) (Topology, error) {
	var t Topology
	for rest := strings.TrimLeft(s, separators); rest != ""; rest = strings.TrimLeft(rest, separators) {
		if m := sparePattern.FindStringSubmatch(rest); m != nil {
			n, err := number(m[1])
			if err != nil {
				return Topology{}, fmt.Errorf("%w %q: %w", ErrTopology, s, err)
			}
			t.Spare, rest = n, ""
			continue
		}
		m := groupPattern.FindStringSubmatch(rest)
		if m == nil {
			return Topology{}, fmt.Errorf("%w %q at %q: expected something like 2E1P1D, 1Dx4, 4EPD or +2 (E encodes, P computes prompts, D decodes, + is spare NPUs)", ErrTopology, s, rest)
		}
		g := Group{Roles: m[2], NPUs: 1}
		var err error
		if g.Count, err = number(m[1]); err == nil && m[3] != "" {
			g.NPUs, err = number(m[3])
		}
		if err == nil && g.Count < 1 {
			err = errors.New("numbers of instances are at least 1")
		}
		if err == nil {
			err = CheckRoles(g.Roles)
		}
		if err != nil {
			return Topology{}, fmt.Errorf("%w %q: %w", ErrTopology, s, err)
		}
		t.Groups = append(t.Groups, g)
		rest = rest[len(m[0]):]
	}
	if len(t.Groups) == 0 {
		return Topology{}, fmt.Errorf("%w %q: no instance", ErrTopology, s)
	}
	return t, nil
}

// CheckRoles says what is wrong with the letters of an instance's roles.
func CheckRoles(letters string) error {
	if letters == "" || !strings.Contains("EPD", letters) && letters != "ED" {
		return fmt.Errorf("roles %q: each of E, P, D at most once, in this order", letters)
	}
	return nil
}

func number(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n > maxTopology {
		return 0, fmt.Errorf("%s is more than %d", s, maxTopology)
	}
	return n, nil
}

// NPUs is the number of all NPUs, spare ones included.
func (t Topology) NPUs() int {
	n := t.Spare
	for _, g := range t.Groups {
		n += g.Count * g.NPUs
	}
	return n
}

// Instances is the number of instances that have a role, 'E', 'P' or 'D', and NPUs.
func (t Topology) Instances(role byte) int {
	n := 0
	for _, g := range t.Groups {
		if g.NPUs > 0 && strings.IndexByte(g.Roles, role) >= 0 {
			n += g.Count
		}
	}
	return n
}

// Without is the topology without a role, 'E', 'P' or 'D', and without the instances that have no other one.
func (t Topology) Without(role byte) Topology {
	rest := Topology{Spare: t.Spare}
	for _, g := range t.Groups {
		if g.Roles = strings.ReplaceAll(g.Roles, string(role), ""); g.Roles != "" {
			rest.Groups = append(rest.Groups, g)
		}
	}
	return rest
}

// String writes the notation.
func (t Topology) String() string {
	var b strings.Builder
	for i, g := range t.Groups {
		if i > 0 && t.Groups[i-1].NPUs != 1 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%d%s", g.Count, g.Roles)
		if g.NPUs != 1 {
			fmt.Fprintf(&b, "x%d", g.NPUs)
		}
	}
	if t.Spare > 0 {
		fmt.Fprintf(&b, "+%d", t.Spare)
	}
	return b.String()
}
