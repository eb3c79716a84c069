package benchcmd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"trireme.dev/shared/wire"
)

// way is a way to change the number of NPUs that serve.
type way struct {
	name   string
	adds   bool // it can only add NPUs
	shares bool // the NPUs have two copies of the weights for a time, and half of their memory is set aside for that
	// change makes it, and returns when all of the new capacity serves, with what the way has to tell of itself.
	change func(context.Context, *site) (map[string]float64, error)
}

func (w *way) fits(from, to int) bool { return !w.adds || to > from }

// allWays are those of ElasticMoE (arXiv:2510.02613, section 7.1).
var allWays = []way{
	{name: "elastic", change: elastic},
	{name: "cold", change: cold},
	{name: "extravagant", change: beside},
	{name: "colocated", shares: true, change: beside},
	{name: "horizontal", adds: true, change: replica},
}

// elastic has the instance change itself.
func elastic(ctx context.Context, s *site) (map[string]float64, error) {
	binary, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("finding this program: %w", err)
	}
	cmd := exec.CommandContext(ctx, binary, "scale", s.name, strconv.Itoa(s.scale.To), "--copy-rate", s.scale.CopyRate.String(),
		"--timeout", s.scale.Longest.String(), "--nats-url", s.nats, "--json")
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("trireme scale: %w: %s", err, strings.TrimSpace(said.String()))
	}
	var r wire.ChangeReport
	if err := json.Unmarshal(out, &r); err != nil {
		return nil, fmt.Errorf("reading what trireme scale says: %w", err)
	}
	return map[string]float64{
		"plan_s": r.Planning.Seconds(), "copy_s": r.Copying.Seconds(), "copied_bytes": float64(r.Copied), "warm_s": r.Warming.Seconds(),
		"commit_s": r.Committal.Seconds(), "pause_s": r.Pause.Seconds(), "operation_s": r.Total.Seconds(),
	}, nil
}

// cold stops the instance and starts another one.
func cold(ctx context.Context, s *site) (map[string]float64, error) {
	s.stop(s.instance)
	return nil, s.replace(ctx)
}

// beside starts another instance and stops the old one when that serves.
func beside(ctx context.Context, s *site) (map[string]float64, error) {
	old := s.instance
	if err := s.replace(ctx); err != nil {
		return nil, err
	}
	s.stop(old)
	return nil, nil
}

// replace starts an instance of --to NPUs and waits until it serves.
func (s *site) replace(ctx context.Context) (err error) {
	if s.instance, s.name, err = s.begin(s.scale.To, true); err != nil {
		return err
	}
	return s.ready(ctx, s.name, s.scale.To)
}

// replica starts a second instance on what is to be added.
func replica(ctx context.Context, s *site) (map[string]float64, error) {
	more := s.scale.To - s.scale.From
	_, name, err := s.begin(more, true)
	if err != nil {
		return nil, err
	}
	return nil, errors.Join(s.ready(ctx, name, more))
}
