package gateway

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"

	"trireme.dev/shared/bus"
	"trireme.dev/shared/imageprep"
)

// Run serves the API until ctx ends and returns nil then. It returns an error when it cannot start: a configuration or
// model folder that cannot be used, an address in use. NATS and the HMM may come later.
func Run(ctx context.Context, cfg Config, log *slog.Logger) error {
	if err := cfg.Validate(); err != nil {
		return fmt.Errorf("configuration of the gateway: %w", err)
	}
	cfg = cfg.withDefaults()
	model, err := LoadModel(cfg.ModelDir, cfg.MaxPixels)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", cfg.HTTP)
	if err != nil {
		return fmt.Errorf("serving HTTP: %w", err)
	}
	var admin net.Listener
	if cfg.Admin != "" {
		if admin, err = net.Listen("tcp", cfg.Admin); err != nil {
			_ = l.Close()
			return fmt.Errorf("serving operators: %w", err)
		}
		defer admin.Close()
	}
	b, err := bus.Connect(ctx, cfg.NATSURL, cfg.Instance, log, bus.WithAckWait(cfg.AckWait), bus.WithReplicas(cfg.Replicas))
	if err != nil {
		_ = l.Close()
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer b.Close()
	g, err := New(ctx, cfg, Parts{Bus: b, Dial: DialHMM(cfg.HMMSocket, cfg.Instance), Model: model, Log: log})
	if err != nil {
		_ = l.Close()
		return err
	}
	if admin != nil {
		served := make(chan error, 1)
		life, end := context.WithCancel(context.WithoutCancel(ctx)) // while the gateway serves
		go func() { served <- g.serveAdmin(life, admin) }()
		defer func() {
			end()
			if err := <-served; err != nil {
				log.Error("nobody serves operators", "error", err)
			}
		}()
	}
	return g.Serve(ctx, l)
}

// LoadModel reads a model folder with shared/imageprep as what measures pictures of at most maxPixels pixels.
func LoadModel(dir string, maxPixels int) (*Model, error) {
	prep, prepErr := imageprep.LoadConfig(dir)
	m, err := NewModel(dir, func(data []byte) ([3]int, int, error) {
		h, err := imageprep.ReadHeader(data, maxPixels)
		if err != nil {
			return [3]int{}, 0, err
		}
		grid, err := prep.Grid(h.Width, h.Height)
		if err != nil {
			return [3]int{}, 0, err
		}
		return [3]int{grid.T, grid.H, grid.W}, grid.Tokens(prep.MergeSize), nil
	})
	if err != nil {
		return nil, fmt.Errorf("loading the model in %s: %w", filepath.Clean(dir), err)
	}
	if m.Config.Vision != nil && prepErr != nil {
		return nil, fmt.Errorf("loading the model in %s: %w", filepath.Clean(dir), prepErr)
	}
	return m, nil
}
